"""The Prometheus metrics of a process's calls to the object store. Without one there are none."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from patchforge.service.results.store import OPERATIONS, ObjectStore

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class ResultMetrics:
    """How long calls took, the bytes they moved, and how many failed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "patchforge_results_seconds",
            "Seconds of a call to the object store, retries included.",
            ("operation",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._bytes = Counter(
            "patchforge_results_bytes",
            "Bytes that went to the object store, and that came from it.",
            ("operation",),
            registry=registry,
        )
        self._failures = Counter(
            "patchforge_results_failures",
            "Calls that failed because the object store did not answer or refused them.",
            ("operation",),
            registry=registry,
        )
        for operation in OPERATIONS:  # there from the start, so that rates see the first one
            self._seconds.labels(operation)
            self._bytes.labels(operation)
            self._failures.labels(operation)

    def record(self, operation: str, seconds: float, size: int, succeeded: bool) -> None:
        """Counts a call: see `ObjectStore.on_call`."""
        self._seconds.labels(operation).observe(seconds)
        self._bytes.labels(operation).inc(size)
        if not succeeded:
            self._failures.labels(operation).inc()


def watch_store(store: ObjectStore | None, registry: CollectorRegistry) -> None:
    """Measures the calls of this process, if there is an object store."""
    if store is not None:
        store.on_call = ResultMetrics(registry).record

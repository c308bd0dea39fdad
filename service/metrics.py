"""Prometheus metrics of worker and gateway, and the merging of several expositions into one.

Label values come from closed lists (models served, samplers, statuses, routes), so no caller can add a series.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from service.schemas import Job, JobStatus, SavingsReport

_BY_REQUEST = ("model", "sampler")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_POWERS_OF_TWO = tuple(2**power for power in range(15))
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"


class WorkerMetrics:
    """What a worker did, and what the samplers saved."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._savings = Histogram(
            "patchforge_request_step_savings_ratio",
            "Share of a completed request's patch evaluations that a dense run would have made and this one did not.",
            _BY_REQUEST,
            registry=registry,
            buckets=_SHARES,
        )
        self._evaluations = Counter(
            "patchforge_patch_evaluations",
            "Patch forward passes made for completed requests, guidance branches included.",
            _BY_REQUEST,
            registry=registry,
        )
        self._saved = Counter(
            "patchforge_patch_evaluations_saved",
            "Patch forward passes that dense runs of the completed requests would have made on top.",
            _BY_REQUEST,
            registry=registry,
        )
        self._queued = Histogram(
            "patchforge_request_queue_seconds",
            "Seconds a completed request waited for a worker.",
            _BY_REQUEST,
            registry=registry,
            buckets=_SECONDS,
        )
        self._first_preview = Histogram(
            "patchforge_time_to_first_preview_seconds",
            "Seconds from accepting a completed request to its first preview.",
            _BY_REQUEST,
            registry=registry,
            buckets=_SECONDS,
        )
        self._duration = Histogram(
            "patchforge_request_duration_seconds",
            "Seconds from accepting a completed request to its end.",
            _BY_REQUEST,
            registry=registry,
            buckets=_SECONDS,
        )
        self._ended = Counter(
            "patchforge_requests",
            "Requests that ended, by how.",
            (*_BY_REQUEST, "status"),
            registry=registry,
        )
        self._dead_lettered = Counter(
            "patchforge_requests_dead_lettered",
            "Requests given up because the worker running them died once too often.",
            _BY_REQUEST,
            registry=registry,
        )
        self._reclaimed = Counter(
            "patchforge_requests_reclaimed",
            "Requests taken over from a worker that fell silent.",
            _BY_REQUEST,
            registry=registry,
        )
        self._lost = Counter(
            "patchforge_claims_lost",
            "Requests a worker dropped: another had taken them over, or the queue server had forgotten them.",
            _BY_REQUEST,
            registry=registry,
        )
        self._running = Gauge(
            "patchforge_requests_running",
            "Requests workers hold now.",
            _BY_REQUEST,
            registry=registry,
        )
        self._patches = Histogram(
            "patchforge_evaluation_patches",
            "Patches packed into one network evaluation, all its requests together.",
            ("model",),
            registry=registry,
            buckets=_POWERS_OF_TWO,
        )

    def exposition(self) -> bytes:
        """All of this in Prometheus's text format."""
        return generate_latest(self._registry)

    def request_started(self, job: Job) -> None:
        self._running.labels(*_request_labels(job)).inc()

    def request_reclaimed(self, job: Job) -> None:
        """A request is about to start over here, for its last worker fell silent."""
        self._reclaimed.labels(*_request_labels(job)).inc()

    def request_released(self, job: Job) -> None:
        """A started request was given back to the queue."""
        self._running.labels(*_request_labels(job)).dec()

    def request_lost(self, job: Job) -> None:
        """A started request turned out to be no longer this worker's."""
        self._running.labels(*_request_labels(job)).dec()
        self._lost.labels(*_request_labels(job)).inc()

    def request_finished(self, job: Job, report: SavingsReport | None, status: JobStatus) -> None:
        """A started request ended here; there is a report if it completed."""
        labels = _request_labels(job)
        self._running.labels(*labels).dec()
        self._ended.labels(*labels, status.value).inc()
        if report is None:
            return
        self._savings.labels(*labels).observe(report.savings_ratio)
        self._evaluations.labels(*labels).inc(report.patch_evaluations)
        self._saved.labels(*labels).inc(max(0, report.dense_patch_evaluations - report.patch_evaluations))
        self._queued.labels(*labels).observe(report.queue_seconds)
        self._duration.labels(*labels).observe(report.duration_seconds)
        if report.time_to_first_preview_seconds is not None:
            self._first_preview.labels(*labels).observe(report.time_to_first_preview_seconds)

    def request_ended_in_queue(self, job: Job) -> None:
        """The queue ended a request no worker held: see ``JobQueue.on_ended``."""
        labels = _request_labels(job)
        self._ended.labels(*labels, job.status.value).inc()
        if job.error is not None and job.error.code == "dead_letter":
            self._dead_lettered.labels(*labels).inc()

    def evaluated(self, model: str, patches: int) -> None:
        """One packed network evaluation was made."""
        self._patches.labels(model).observe(patches)


class GatewayMetrics:
    """What a gateway answered, and what waits behind it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._waiting = Gauge(
            "patchforge_requests_waiting", "Accepted requests no worker has started.", ("model",), registry=registry
        )
        self._ended = Counter(
            "patchforge_requests", "Requests that ended, by how.", (*_BY_REQUEST, "status"), registry=registry
        )
        self._http = Counter(
            "patchforge_http_requests",
            "HTTP requests answered, by class of status code.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "patchforge_http_request_seconds",
            "Seconds to the end of an HTTP answer, streams included.",
            ("method", "route"),
            registry=registry,
            buckets=_SECONDS,
        )
        self._rpc = Counter(
            "patchforge_grpc_requests", "gRPC calls answered, by status code.", ("method", "status"), registry=registry
        )
        self._rpc_seconds = Histogram(
            "patchforge_grpc_request_seconds",
            "Seconds to the end of a gRPC call, streams included.",
            ("method",),
            registry=registry,
            buckets=_SECONDS,
        )

    def exposition(self, workers: Sequence[bytes] = ()) -> bytes:
        """All of this in Prometheus's text format, joined with the expositions of live workers."""
        return merge_expositions([generate_latest(self._registry), *workers])

    def requests_waiting(self, by_model: Mapping[str, int]) -> None:
        """To be told at each scrape; give the models served that have none waiting a 0."""
        self._waiting.clear()
        for model, count in by_model.items():
            self._waiting.labels(model).set(count)

    def request_ended_in_queue(self, job: Job) -> None:
        """The queue ended a request no worker held: see ``JobQueue.on_ended``."""
        self._ended.labels(*_request_labels(job), job.status.value).inc()

    def http_answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """``route`` is the template that matched, never the path asked for; None if none did."""
        method, route = method if method in _METHODS else _OTHER, route or _OTHER
        self._http.labels(method, route, f"{status // 100}xx").inc()
        self._http_seconds.labels(method, route).observe(seconds)

    def rpc_answered(self, method: str | None, status: str, seconds: float) -> None:
        """``method`` is the full name of one served here, or None; ``status`` the name of a gRPC status code."""
        self._rpc.labels(method or _OTHER, status).inc()
        self._rpc_seconds.labels(method or _OTHER).observe(seconds)


def _request_labels(job: Job) -> tuple[str, str]:
    return job.request.model or _OTHER, job.request.sampler.name if job.request.sampler else _OTHER


def merge_expositions(texts: Sequence[bytes]) -> bytes:
    """Sums samples of the same name and labels over several expositions into one valid one; one alone is unchanged.

    Creation times, which have no sum, are left out. Raises ValueError for text that is not an exposition.
    """
    if len(texts) == 1:
        return texts[0]
    families: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            samples = sums.setdefault(family.name, {})
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    samples[key] = samples.get(key, 0.0) + sample.value
    for name, family in families.items():
        for (sample_name, labels), value in sums[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Families(family for family in families.values() if family.samples))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families

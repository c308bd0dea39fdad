"""Prometheus metrics of worker and gateway.

Label values come from closed lists (models served, samplers, statuses, codes, routes), so no caller can add a series.
"""

from __future__ import annotations

import math
from collections import Counter as Counts
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from service.expositions import merge_expositions
from service.sampler_options import SAMPLERS
from service.schemas import Job, JobStatus, SavingsReport

_BY_REQUEST = ("model", "sampler")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_POWERS_OF_TWO = tuple(2**power for power in range(15))
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FILLS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2)
_OTHER = "other"
FAILURE_CODES = (
    "dead_letter",
    "evaluation_failed",
    "invalid_request",
    "not_finite",
    "out_of_memory",
    "preparation_failed",
    "source_lost",
    _OTHER,
)


class WorkerMetrics:
    """What a worker did, and what the samplers saved."""

    def __init__(
        self, registry: CollectorRegistry, patch_budgets: Mapping[str, int], patch_flops: Mapping[str, int]
    ) -> None:
        """Of the models served here: most patches of one evaluation, floating-point operations of one of them."""
        self._registry = registry
        self._patch_budgets = patch_budgets
        self._patch_flops = patch_flops

        def counter(name: str, what: str, labels: Sequence[str] = _BY_REQUEST) -> Counter:
            return Counter(f"patchforge_{name}", what, labels, registry=registry)

        def histogram(
            name: str, what: str, buckets: Sequence[float] = _SECONDS, labels: Sequence[str] = _BY_REQUEST
        ) -> Histogram:
            return Histogram(f"patchforge_{name}", what, labels, registry=registry, buckets=buckets)

        self._savings = histogram(
            "request_step_savings_ratio",
            "Share of a completed request's patch evaluations that a dense run would have made and this one did not.",
            _SHARES,
        )
        self._evaluations = counter(
            "patch_evaluations", "Patch forward passes made for completed requests, guidance branches included."
        )
        self._saved = counter(
            "patch_evaluations_saved",
            "Patch forward passes that dense runs of the completed requests would have made on top.",
        )
        self._flops = counter(
            "flops", "Floating-point operations of completed requests' patch evaluations: see model/flops.py."
        )
        self._flops_saved = counter(
            "flops_saved", "Floating-point operations of the patch evaluations that completed requests saved."
        )
        self._queued = histogram("request_queue_seconds", "Seconds a completed request waited for a worker.")
        self._first_preview = histogram(
            "time_to_first_preview_seconds", "Seconds from accepting a completed request to its first preview."
        )
        self._duration = histogram("request_duration_seconds", "Seconds from accepting a completed request to its end.")
        self._ended = counter("requests", "Requests that ended, by how.", (*_BY_REQUEST, "status"))
        self._failures = counter(
            "request_failures", "Requests that failed, by the error code their callers saw.", ("model", "code")
        )
        self._dead_lettered = counter(
            "requests_dead_lettered", "Requests given up because the worker running them died once too often."
        )
        self._reclaimed = counter("requests_reclaimed", "Requests taken over from a worker that fell silent.")
        self._lost = counter(
            "claims_lost",
            "Requests a worker dropped: another had taken them over, or the queue server had forgotten them.",
        )
        self._running = Gauge(
            "patchforge_requests_running", "Requests workers hold now.", _BY_REQUEST, registry=registry
        )
        self._patches = histogram(
            "evaluation_patches",
            "Patches packed into one network evaluation, all its requests together.",
            _POWERS_OF_TWO,
            ("model",),
        )
        self._fill = histogram(
            "evaluation_fill_ratio",
            "Patches of one network evaluation as a share of the patch budget, which one large request may exceed.",
            _FILLS,
            ("model",),
        )
        self._step = histogram(
            "evaluation_seconds",
            "Seconds of one engine step: a network evaluation, the samplers' updates, the decoding of what is shown.",
            _STEP_SECONDS,
            ("model",),
        )
        budget = Gauge(
            "patchforge_worker_patch_budget",
            "Patches one network evaluation may have, as set or as found by a profile at start.",
            ("model",),
            registry=registry,
        )
        for model, patches in patch_budgets.items():
            budget.labels(model).set(patches)
        for model in patch_flops:  # what alerts look at is there from the start: a first event is then an increase
            for code in FAILURE_CODES:
                self._failures.labels(model, code)
            for sampler in SAMPLERS:
                self._reclaimed.labels(model, sampler)

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

    def request_finished(
        self, job: Job, report: SavingsReport | None, status: JobStatus, code: str | None = None
    ) -> None:
        """A started request ended here; there is a report if it completed, and a code if it failed."""
        labels = _request_labels(job)
        self._running.labels(*labels).dec()
        self._ended.labels(*labels, status.value).inc()
        if code is not None:
            self._failed(labels[0], code)
        if report is None:
            return
        done, saved = report.patch_evaluations, max(0, report.dense_patch_evaluations - report.patch_evaluations)
        flops = self._patch_flops.get(labels[0], 0)
        self._savings.labels(*labels).observe(report.savings_ratio)
        self._evaluations.labels(*labels).inc(done)
        self._saved.labels(*labels).inc(saved)
        self._flops.labels(*labels).inc(done * flops)
        self._flops_saved.labels(*labels).inc(saved * flops)
        self._queued.labels(*labels).observe(report.queue_seconds)
        self._duration.labels(*labels).observe(report.duration_seconds)
        if report.time_to_first_preview_seconds is not None:
            self._first_preview.labels(*labels).observe(report.time_to_first_preview_seconds)

    def request_ended_in_queue(self, job: Job) -> None:
        """The queue ended a request no worker held: see ``JobQueue.on_ended``."""
        labels = _request_labels(job)
        self._ended.labels(*labels, job.status.value).inc()
        if job.error is not None:
            self._failed(labels[0], job.error.code)
            if job.error.code == "dead_letter":
                self._dead_lettered.labels(*labels).inc()

    def evaluated(self, model: str, patches: int, seconds: float) -> None:
        """One engine step was made: a packed network evaluation and what goes with it."""
        self._patches.labels(model).observe(patches)
        self._fill.labels(model).observe(patches / self._patch_budgets[model])
        self._step.labels(model).observe(seconds)

    def _failed(self, model: str, code: str) -> None:
        self._failures.labels(model, code if code in FAILURE_CODES else _OTHER).inc()


@dataclass(frozen=True)
class QueueState:
    """What a gateway sees of the queue it shares with others, at one scrape."""

    waiting: Mapping[str, int]
    """Waiting requests of each model that has any."""
    oldest_seconds: Mapping[str, float]
    """How long the first of them has waited, by the queue server's clock."""
    workers: Collection[Collection[str]]
    """The models each live worker serves."""
    memory_bytes: int
    memory_limit_bytes: int
    """0 if the queue server has none."""


class GatewayMetrics:
    """What a gateway answered, and what waits behind it."""

    def __init__(self, registry: CollectorRegistry, max_waiting: int) -> None:
        """``max_waiting`` is when submits are refused."""
        self._registry = registry
        ProcessCollector(registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"patchforge_{name}", what, labels, registry=registry)

        self._queue_up = gauge("queue_up", "1 if the queue server answered this scrape, else 0.")
        gauge("queue_capacity", "Waiting requests at which submits are refused.").set(max_waiting)
        self._memory = gauge("queue_memory_bytes", "Memory the queue server uses.")
        self._memory_limit = gauge("queue_memory_limit_bytes", "Memory the queue server may use; 0 = no limit set.")
        self._waiting = gauge("requests_waiting", "Accepted requests no worker has started.", "model")
        self._oldest = gauge("queue_oldest_seconds", "Seconds the longest waiting request has waited.", "model")
        self._workers = gauge("workers", "Live workers.")
        self._model_workers = gauge("model_workers", "Live workers that serve a model.", "model")
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

    def queue_seen(self, state: QueueState | None) -> None:
        """To be told at each scrape; None if the queue server does not answer, and then nothing is claimed of it."""
        for by_model in (self._waiting, self._oldest, self._model_workers):
            by_model.clear()
        self._queue_up.set(state is not None)
        if state is None:
            for gauge in (self._memory, self._memory_limit, self._workers):
                gauge.set(math.nan)
            return
        self._memory.set(state.memory_bytes)
        self._memory_limit.set(state.memory_limit_bytes)
        self._workers.set(len(state.workers))
        served = Counts(model for models in state.workers for model in models)
        for model in served.keys() | state.waiting.keys():
            self._model_workers.labels(model).set(served[model])
            self._waiting.labels(model).set(state.waiting.get(model, 0))
            self._oldest.labels(model).set(state.oldest_seconds.get(model, 0))

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

"""The Prometheus metrics of a worker: what it did, and what the samplers saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from patchforge.service.logs import DROPPED
from patchforge.service.messages.samplers import SAMPLERS
from patchforge.service.messages.schemas import Job, JobStatus, SavingsReport
from patchforge.service.metrics import BY_REQUEST, OTHER, SECONDS, request_labels

_STEP_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_ERRORS = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1)
_POWERS_OF_TWO = tuple(2**power for power in range(15))
_FILLS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2)
LOWERED_BY = "load", "time"
"""What lowers the quality of requests."""
MET = "yes", "no"
FAILURE_CODES = (
    "dead_letter",
    "evaluation_failed",
    "invalid_request",
    "not_finite",
    "out_of_memory",
    "preparation_failed",
    "source_lost",
    "unsupported",
    OTHER,
)


class WorkerMetrics:
    """What a worker did, and what the samplers saved."""

    def __init__(
        self, registry: CollectorRegistry, patch_budgets: Mapping[str, int], patch_flops: Mapping[str, int]
    ) -> None:
        """Both map each served model: to the most patches of one evaluation, and to the FLOPs of one patch."""
        self._registry = registry
        self._patch_budgets = patch_budgets
        self._patch_flops = patch_flops
        registry.register(DROPPED)

        def counter(name: str, what: str, labels: Sequence[str] = BY_REQUEST) -> Counter:
            return Counter(f"patchforge_{name}", what, labels, registry=registry)

        def histogram(
            name: str, what: str, buckets: Sequence[float] = SECONDS, labels: Sequence[str] = BY_REQUEST
        ) -> Histogram:
            return Histogram(f"patchforge_{name}", what, labels, registry=registry, buckets=buckets)

        self._savings = histogram(
            "request_step_savings_ratio",
            "Share of a completed request's dense patch evaluations that it did not need.",
            _SHARES,
        )
        self._evaluations = counter(
            "patch_evaluations", "Patch forward passes made for completed requests, guidance branches included."
        )
        self._saved = counter(
            "patch_evaluations_saved",
            "Patch forward passes that dense runs of the completed requests would have made in addition.",
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
        self._ended = counter("requests", "Ended requests, by final status.", (*BY_REQUEST, "status"))
        self._failures = counter(
            "request_failures", "Requests that failed, by the error code their callers saw.", ("model", "code")
        )
        self._dead_lettered = counter(
            "requests_dead_lettered", "Requests given up because their workers stopped responding too often."
        )
        self._reclaimed = counter("requests_reclaimed", "Requests taken over from a worker that stopped responding.")
        self._lost = counter(
            "claims_lost",
            "Requests that a worker dropped: another worker had taken them over, or the queue server had lost them.",
        )
        self._degraded = counter(
            "requests_degraded",
            "Completed requests whose quality was lowered: by load, or by time that was too short even alone.",
            ("model", "reason"),
        )
        self._in_time = counter(
            "requests_in_time",
            "Completed requests with `finish_within_seconds`, by whether they kept it.",
            ("model", "met"),
        )
        self._predicted_error = histogram(
            "predicted_error",
            "Predicted error of pictures whose path was changed, in standard deviations of the latents.",
            _ERRORS,
            ("model",),
        )
        self._running = Gauge(
            "patchforge_requests_running", "Requests that workers hold now.", BY_REQUEST, registry=registry
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
            "Seconds of one engine step: a network evaluation, the samplers' updates, and decoding.",
            _STEP_SECONDS,
            ("model",),
        )
        budget = Gauge(
            "patchforge_worker_patch_budget",
            "Most patches of one network evaluation: the setting, or what a profile found at start.",
            ("model",),
            registry=registry,
        )
        for model, patches in patch_budgets.items():
            budget.labels(model).set(patches)
        for model in patch_flops:  # alerts need these series from the start: then the first event is an increase
            for code in FAILURE_CODES:
                self._failures.labels(model, code)
            for reason in LOWERED_BY:
                self._degraded.labels(model, reason)
            for met in MET:
                self._in_time.labels(model, met)
            self._predicted_error.labels(model)
            for sampler in SAMPLERS:
                self._reclaimed.labels(model, sampler)

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def request_started(self, job: Job) -> None:
        self._running.labels(*request_labels(job)).inc()

    def request_reclaimed(self, job: Job) -> None:
        """A request will start again here, because its last worker stopped responding."""
        self._reclaimed.labels(*request_labels(job)).inc()

    def request_released(self, job: Job) -> None:
        """A started request was given back to the queue."""
        self._running.labels(*request_labels(job)).dec()

    def request_lost(self, job: Job) -> None:
        """A started request no longer belongs to this worker."""
        self._running.labels(*request_labels(job)).dec()
        self._lost.labels(*request_labels(job)).inc()

    def request_finished(
        self, job: Job, report: SavingsReport | None, status: JobStatus, code: str | None = None
    ) -> None:
        """A started request ended here: with a report if it completed, with an error code if it failed."""
        labels = request_labels(job)
        self._running.labels(*labels).dec()
        self._ended.labels(*labels, status.value).inc()
        if code is not None:
            self._count_failure(labels[0], code)
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
        if report.lowered_by is not None:
            self._degraded.labels(labels[0], report.lowered_by).inc()
        if report.finished_in_time is not None:
            self._in_time.labels(labels[0], "yes" if report.finished_in_time else "no").inc()
        for image in report.images:
            if image.predicted_error is not None:
                self._predicted_error.labels(labels[0]).observe(image.predicted_error)
        if report.time_to_first_preview_seconds is not None:
            self._first_preview.labels(*labels).observe(report.time_to_first_preview_seconds)

    def request_ended_in_queue(self, job: Job) -> None:
        """The queue ended a request that no worker held: see `JobQueue.on_ended`."""
        labels = request_labels(job)
        self._ended.labels(*labels, job.status.value).inc()
        if job.error is not None:
            self._count_failure(labels[0], job.error.code)
            if job.error.code == "dead_letter":
                self._dead_lettered.labels(*labels).inc()

    def evaluated(self, model: str, patches: int, seconds: float) -> None:
        """An engine step is complete: a packed network evaluation and the work around it."""
        self._patches.labels(model).observe(patches)
        self._fill.labels(model).observe(patches / self._patch_budgets[model])
        self._step.labels(model).observe(seconds)

    def _count_failure(self, model: str, code: str) -> None:
        self._failures.labels(model, code if code in FAILURE_CODES else OTHER).inc()

"""Spans of a worker's jobs: how long a job waited, its run, and each engine step that it took part in.

A step serves many jobs. Each sampled job gets a span for it in its own trace, so that every trace is complete. The
spans of one step have the same times, and all but the first link to the first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.trace import Link, Span, SpanKind, StatusCode, set_span_in_context

from patchforge.service.messages.schemas import JobError, SavingsReport
from patchforge.service.queue import Claim, keys
from patchforge.service.tracing import TRACER, context_of, job_attributes


class JobSpans:
    """Spans of the running jobs. Jobs whose trace is not sampled get none."""

    def __init__(self) -> None:
        self._open: dict[str, Span] = {}

    def begin(self, claim: Claim) -> None:
        """Start a job's span. If this is its first start, also record how long it waited."""
        job, now = claim.job, time.time_ns()
        attributes = job_attributes(job)
        span = TRACER.start_span("job", context_of(job), SpanKind.CONSUMER, attributes, start_time=now)
        if not span.is_recording():
            return
        self._open[job.id] = span
        if claim.attempt == 1 and not keys.is_returned(claim.stream):
            waited = max(0.0, (job.started_at or job.created_at) - job.created_at)
            # The duration comes from the queue server's clock, the position from this machine's, like all other spans.
            # Without a caller's span, the wait belongs to the job's span, although it ends when that begins.
            parent = context_of(job) if job.trace else set_span_in_context(span)
            wait = TRACER.start_span("queue wait", parent, attributes=attributes, start_time=now - round(waited * 1e9))
            wait.end(now)

    def stepped(self, patches: Mapping[str, int], began: int, broken: Mapping[str, JobError]) -> None:
        """Record a step that has just ended.

        Args:
            patches: job id → patches evaluated for it.
            began: when the step began, in nanoseconds since 1970.
            broken: job id → error, for jobs that the step broke.
        """
        if not self._open:
            return
        links: list[Link] = []
        now = time.time_ns()
        together = {"patchforge.step.jobs": len(patches), "patchforge.step.patches": sum(patches.values())}
        for job_id in filter(self._open.__contains__, patches):
            attributes = together | {"patchforge.patches": patches[job_id]}
            context = set_span_in_context(self._open[job_id])
            span = TRACER.start_span("step", context, attributes=attributes, links=links, start_time=began)
            links = links or [Link(span.get_span_context())]
            if job_id in broken:
                _record_error(span, broken[job_id])
            span.end(now)

    def end(
        self, job_id: str, outcome: str, report: SavingsReport | None = None, error: JobError | None = None
    ) -> None:
        """End a job's span: the job has left this worker."""
        span = self._open.pop(job_id, None)
        if span is None:
            return
        span.set_attribute("patchforge.outcome", outcome)
        if report is not None:
            span.set_attribute("patchforge.patch_evaluations", report.patch_evaluations)
            saved = report.dense_patch_evaluations - report.patch_evaluations
            span.set_attribute("patchforge.patch_evaluations_saved", saved)
        if error is not None:
            _record_error(span, error)
        span.end()


def _record_error(span: Span, error: JobError) -> None:
    span.set_attribute("error.type", error.code)
    span.set_status(StatusCode.ERROR, error.message)

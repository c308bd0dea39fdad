"""Spans of the jobs a worker holds: how long each waited, its run, and every engine step that took it further.

A step serves many jobs, and each of them has a span for it in its own trace, so that every trace is whole. Those of one
step have the same times, and all but the first link to the first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.trace import Link, Span, SpanKind, StatusCode, set_span_in_context

from service import keys
from service.queue import Claim
from service.schemas import JobError, SavingsReport
from service.tracing import TRACER, context_of, job_attributes


class JobSpans:
    """Of the jobs in flight. Those that no one samples take part in nothing."""

    def __init__(self) -> None:
        self._open: dict[str, Span] = {}

    def begin(self, claim: Claim) -> None:
        """A worker has the job; if for the first time, its wait is over."""
        job, now = claim.job, time.time_ns()
        attributes = job_attributes(job)
        span = TRACER.start_span("job", context_of(job), SpanKind.CONSUMER, attributes, start_time=now)
        if not span.is_recording():
            return
        self._open[job.id] = span
        if claim.attempt == 1 and claim.stream != keys.queue(job.request.model or "", keys.RETURNED):
            # As long as the queue server's clock says, and where this machine's, like all spans of the job, puts it.
            waited = max(0.0, (job.started_at or job.created_at) - job.created_at)
            # Without a call to hang from, it belongs to the job, though it is over when that begins.
            parent = context_of(job) if job.trace else set_span_in_context(span)
            wait = TRACER.start_span("queue wait", parent, attributes=attributes, start_time=now - round(waited * 1e9))
            wait.end(now)

    def stepped(self, patches: Mapping[str, int], began: int, broken: Mapping[str, JobError]) -> None:
        """A step that began at ``began``, in nanoseconds since 1970, and has just ended; by job, the patches it took
        of each, and what broke.
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
                _note(span, broken[job_id])
            span.end(now)

    def end(
        self, job_id: str, outcome: str, report: SavingsReport | None = None, error: JobError | None = None
    ) -> None:
        """The job is out of this worker's hands."""
        span = self._open.pop(job_id, None)
        if span is None:
            return
        span.set_attribute("patchforge.outcome", outcome)
        if report is not None:
            span.set_attribute("patchforge.patch_evaluations", report.patch_evaluations)
            saved = report.dense_patch_evaluations - report.patch_evaluations
            span.set_attribute("patchforge.patch_evaluations_saved", saved)
        if error is not None:
            _note(span, error)
        span.end()


def _note(span: Span, error: JobError) -> None:
    span.set_attribute("error.type", error.code)
    span.set_status(StatusCode.ERROR, error.message)

"""OpenTelemetry traces, set up by the standard `OTEL_…` variables; without them, the SDK is not loaded."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from patchforge.service.messages.schemas import Job, JobStatus

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_SECONDS = 3.0  # a stopping process waits this long for the export of its last spans
MAX_TRACESTATE = 512  # characters of the caller's text; W3C asks everyone to pass on this many
REPEAT_SECONDS = 60.0
TRACER = trace.get_tracer("patchforge")
"""Its spans have no effect outside of `traced`, and without exporters."""

log = structlog.get_logger(__name__)
_trace_context = TraceContextTextMapPropagator()


@contextmanager
def traced(process: str) -> Iterator[None]:
    """Export the spans of the body if the environment asks for it; `process` is gateway or worker.

    The body runs even if tracing fails, and never waits for the collector: a thread exports spans from a bounded
    queue, and the last spans get `FLUSH_SECONDS`.
    """
    provider = None
    if exporters := exporters_wanted(os.environ):
        try:
            provider = _provider(process, exporters)
            trace.set_tracer_provider(provider)
            log.info("exporting traces", exporters=exporters, service=provider.resource.attributes["service.name"])
        except Exception as error:
            log.warning("traces cannot be exported", reason=str(error))
    try:
        yield
    finally:
        if provider is not None:
            flushing = threading.Thread(target=provider.shutdown, daemon=True)
            flushing.start()
            flushing.join(FLUSH_SECONDS)
            if flushing.is_alive():
                log.warning("the last traces were not exported in time")


def is_on() -> bool:
    """Whether spans are exported."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def exporters_wanted(environment: Mapping[str, str]) -> list[str]:
    """Registered names of the exporters to use; empty if traces are off."""

    def value(name: str) -> str:
        return environment.get(name, "").strip()

    endpoint = value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or value("OTEL_EXPORTER_OTLP_ENDPOINT")
    named = value("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if value("OTEL_SDK_DISABLED").lower() == "true" or named == "none":
        return []
    protocol = value("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or value("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    return [otlp if name.strip() == "otlp" else name.strip() for name in named.split(",")]


def carrier() -> dict[str, str]:
    """The current span as a W3C trace context, to store with a job; empty if nothing is traced."""
    headers: dict[str, str] = {}
    _trace_context.inject(headers)
    if len(headers.get("tracestate", "")) > MAX_TRACESTATE:
        del headers["tracestate"]
    return headers


def context_of(job: Job) -> Context:
    """Parent of a job's spans: the call that submitted it; empty if that call was not traced."""
    return _trace_context.extract(job.trace)


def ended_in_queue(job: Job) -> None:
    """Record the span of a job that did not end at a worker, for `JobQueue.on_ended`.

    If the job ran, the span covers its whole life, because the spans of its dead workers are lost.
    """
    name = "queue wait" if job.started_at is None else "job"
    begin = job.created_at if job.started_at is None else job.started_at
    attributes = job_attributes(job)
    span = TRACER.start_span(name, context_of(job), SpanKind.CONSUMER, attributes, start_time=_nanoseconds(begin))
    span.set_attribute("patchforge.outcome", job.status.value)
    if job.error is not None:
        span.set_attribute("error.type", job.error.code)
        span.set_status(StatusCode.ERROR, job.error.message)
    elif job.status is JobStatus.EXPIRED:
        span.set_attribute("error.type", "expired")
        span.set_status(StatusCode.ERROR, "no worker was free before the deadline")
    span.end(_nanoseconds(job.finished_at or begin))


def job_attributes(job: Job) -> dict[str, str | int]:
    """Attributes of a job's spans; never its prompt."""
    request = job.request
    return {
        "patchforge.job": job.id,
        "patchforge.model": request.model or "",
        "patchforge.sampler": request.sampler.name if request.sampler else "",
        "patchforge.steps": request.steps or 0,
        "patchforge.pictures": request.n,
        "patchforge.priority": request.priority.value,
        "patchforge.attempt": job.attempt,
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e6) * 1000  # Redis counts microseconds


def _provider(process: str, exporters: list[str]) -> TracerProvider:
    """The SDK reads the variables for samplers, limits, queues and attributes itself."""
    classes = []
    for name in exporters:
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise LookupError(
                f"exporter {name} is not installed; otlp_proto_http comes with pip install 'patchforge[otel]'"
            )
        classes.append(found[0].load())
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _log_warnings_of("opentelemetry")
    resource = Resource({"service.version": version("patchforge")}).merge(Resource.create())
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": f"patchforge-{process}"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in classes:
        provider.add_span_processor(BatchSpanProcessor(exporter()))
    return provider


class _LogHandler(logging.Handler):
    """Sends a library's warnings to our log; the same one once a minute, because a collector may be away for long."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._last.get(record.msg, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._last[record.msg] = now
            log.warning("tracing", logger=record.name, reason=record.getMessage())


def _log_warnings_of(library: str) -> None:
    logger = logging.getLogger(library)
    logger.propagate = False
    logger.addHandler(_LogHandler())

"""OpenTelemetry traces, as the standard ``OTEL_…`` variables ask for them; without those, nothing is loaded."""

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

from service.schemas import Job, JobStatus

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_SECONDS = 3.0  # that a stopping process waits for its last spans to be taken
LONGEST_STATE = 512  # of tracestate, which is the caller's own text; what W3C asks everyone to pass on
SAID_AGAIN_SECONDS = 60.0
TRACER = trace.get_tracer("patchforge")
"""Until `traced` is entered, and without exporters, its spans are nothing."""

log = structlog.get_logger(__name__)
_trace_context = TraceContextTextMapPropagator()


@contextmanager
def traced(process: str) -> Iterator[None]:
    """Exports what the body traces, if the environment asks for that; ``process`` is gateway or worker.

    Nothing that is wrong with tracing keeps the body from running, and no collector holds it up: spans leave through
    a bounded queue on a thread of its own, and the last ones get ``FLUSH_SECONDS``.
    """
    provider = None
    if exporters := exporters_wanted(os.environ):
        try:
            provider = _provider(process, exporters)
            trace.set_tracer_provider(provider)
            log.info("exporting traces", exporters=exporters, service=provider.resource.attributes["service.name"])
        except Exception as error:
            log.warning("traces are asked for and cannot be exported", reason=str(error))
    try:
        yield
    finally:
        if provider is not None:
            flushing = threading.Thread(target=provider.shutdown, daemon=True)
            flushing.start()
            flushing.join(FLUSH_SECONDS)
            if flushing.is_alive():
                log.warning("the last traces were not taken in time")


def is_on() -> bool:
    """Whether spans go anywhere."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def exporters_wanted(environment: Mapping[str, str]) -> list[str]:
    """Names of exporters, as their packages register them; none if traces are off."""

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
    """The span in progress as W3C trace context, to travel with a job; empty if nothing is traced."""
    headers: dict[str, str] = {}
    _trace_context.inject(headers)
    if len(headers.get("tracestate", "")) > LONGEST_STATE:
        del headers["tracestate"]
    return headers


def context_of(job: Job) -> Context:
    """What a job's spans hang from: the call that submitted it; nothing if that was not traced."""
    return _trace_context.extract(job.trace)


def ended_in_queue(job: Job) -> None:
    """The span of a job that ended in no worker's hands, for `JobQueue.on_ended`.

    One that ran has its whole life here, for the spans of its workers died with them.
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
    """What the spans of a job say of it; never its prompt."""
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
    return round(seconds * 1e6) * 1000  # Redis tells microseconds


def _provider(process: str, exporters: list[str]) -> TracerProvider:
    """Samplers, limits, queues and attributes are the SDK's affair, which reads their variables itself."""
    classes = []
    for name in exporters:
        found = list(entry_points(group="opentelemetry_traces_exporter", name=name))
        if not found:
            raise LookupError(f"no exporter {name} is installed; pip install 'patchforge[otel]' brings otlp_proto_http")
        classes.append(found[0].load())
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    _hear_out("opentelemetry")
    resource = Resource({"service.version": version("patchforge")}).merge(Resource.create())
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": f"patchforge-{process}"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in classes:
        provider.add_span_processor(BatchSpanProcessor(exporter()))
    return provider


class _IntoOurLog(logging.Handler):
    """What a library says, in our log; the same only once a minute, for a collector may be away for long."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._said.get(record.msg, -SAID_AGAIN_SECONDS) >= SAID_AGAIN_SECONDS:
            self._said[record.msg] = now
            log.warning("tracing", logger=record.name, reason=record.getMessage())


def _hear_out(library: str) -> None:
    logger = logging.getLogger(library)
    logger.propagate = False
    logger.addHandler(_IntoOurLog())

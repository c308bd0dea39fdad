"""Tracing spans of the calls a gateway answers: settings for FastAPI's own HTTP spans, and spans for gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode

from patchforge.service.gateway.auth import is_open
from patchforge.service.gateway.prefix import route_path
from patchforge.service.tracing import TRACER

# One span per call, none for probes, metrics or the playground. Metrics and logs are our own.
HTTP: TelemetryConfig = {
    "tracing": True,
    "operation_spans": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
    "exclude": lambda scope: is_open(route_path(scope)),
}
SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""gRPC statuses that count as server errors, by OpenTelemetry's conventions."""


@contextmanager
def rpc_span(method: str, metadata: Sequence[tuple[str, Any]] | None) -> Iterator[None]:
    """Opens the span of one call as part of the caller's trace. `method` is gRPC's name, `/service/method`."""
    headers = {name: value for name, value in metadata or () if isinstance(value, str)}
    with TRACER.start_as_current_span(
        method.removeprefix("/"),
        propagate.extract(headers),
        SpanKind.SERVER,
        {"rpc.system.name": "grpc", "rpc.method": method.removeprefix("/")},
        record_exception=False,
        set_status_on_exception=False,
    ):
        yield


def set_rpc_status(status: str) -> None:
    """Records on the current span how its call ended."""
    span = trace.get_current_span()
    span.set_attribute("rpc.response.status_code", status)
    if status != "OK":
        span.set_attribute("error.type", status)
    if status in SERVER_ERRORS:
        span.set_status(StatusCode.ERROR)

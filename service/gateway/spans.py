"""Spans of the calls a gateway answers: HTTP, which FastAPI makes itself, and gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode

from service.gateway.auth import is_open
from service.tracing import TRACER

# One span a call, of none that probes, scrapes or loads the playground. Counting and logging are ours already.
HTTP: TelemetryConfig = {
    "tracing": True,
    "operation_spans": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
    "exclude": lambda scope: is_open(scope["path"]),
}
OUR_FAULT = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses with which a gRPC call counts as failed on the server's side too, by OpenTelemetry's conventions."""


@contextmanager
def rpc_span(method: str, metadata: Sequence[tuple[str, Any]] | None) -> Iterator[None]:
    """The span of one call, ``method`` as gRPC names it, ``/service/method``; it goes on with the caller's trace."""
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


def rpc_ended(status: str) -> None:
    """Notes how the call in progress ended."""
    span = trace.get_current_span()
    span.set_attribute("rpc.response.status_code", status)
    if status != "OK":
        span.set_attribute("error.type", status)
    if status in OUR_FAULT:
        span.set_status(StatusCode.ERROR)

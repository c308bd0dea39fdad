"""An OTLP/HTTP collector that keeps all spans it receives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.patience import PATIENCE


@dataclass(frozen=True)
class Sent:
    """A span as it was sent. Ids are hexadecimal, times are nanoseconds since 1970."""

    service: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    message: str
    attributes: dict[str, Any]
    links: tuple[str, ...]
    """Ids of the linked spans."""


class Collector(AbstractContextManager["Collector"]):
    """Listens on a free port of loopback inside the block."""

    def __init__(self) -> None:
        self.spans: list[Sent] = []
        self._news = threading.Condition()
        keep = self._keep

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest()
                request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
                status = 200 if self.path == "/v1/traces" else 404
                if status == 200:
                    keep(request)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def until(self, enough: Callable[[list[Sent]], bool], trace: str) -> list[Sent]:
        """Waits for this many spans of a trace, and returns them by start time."""

        def of_it() -> list[Sent]:
            return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.start)

        with self._news:
            found = self._news.wait_for(lambda: enough(of_it()), PATIENCE)
        assert found, f"only {of_it()}"
        return of_it()

    def _keep(self, request: ExportTraceServiceRequest) -> None:
        for by_resource in request.resource_spans:
            service = _plain(by_resource.resource.attributes)["service.name"]
            spans = [span for by_scope in by_resource.scope_spans for span in by_scope.spans]
            with self._news:
                self.spans += [_sent(service, span) for span in spans]
                self._news.notify_all()


def _sent(service: str, span: Any) -> Sent:
    return Sent(
        service=service,
        name=span.name,
        kind=span.kind,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        message=span.status.message,
        attributes=_plain(span.attributes),
        links=tuple(link.span_id.hex() for link in span.links),
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}

"""Around every gRPC call: the key, the parsing, the errors, the count, the span."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health

from service import tracing
from service.errors import InvalidRequest, PatchforgeError, Unauthenticated
from service.gateway.auth import ApiKeys
from service.gateway.spans import rpc_ended, rpc_span
from service.metrics import GatewayMetrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Call:
    """One call in progress, and whose it is."""

    context: Any
    tenant: str | None

    async def begin(self) -> None:
        """Opens a stream of answers. Left to the first of them, a client too slow for it could be told nothing more."""
        await self.context.send_initial_metadata(())


class TooSlow(Exception):
    """The client does not read its events."""


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Around every call to our own ``services``: asks for the key, parses the request, turns errors into statuses,
    and counts. Of the other services, only health answers callers without a key.
    """

    def __init__(self, services: Sequence[str], metrics: GatewayMetrics, keys: ApiKeys) -> None:
        self.services = tuple(f"/{name}/" for name in services)
        self.metrics = metrics
        self.keys = keys

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return handler
        if not details.method.startswith(self.services):
            try:
                self.keys.tenant_of_call(details.method, details.invocation_metadata)
            except Unauthenticated as error:
                return _refusal(error)
            return handler
        wrapped = self._wrap(details.method, handler.unary_unary or handler.unary_stream, handler.request_deserializer)
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        return make(wrapped, None, handler.response_serializer)

    def _wrap(self, method: str, call: Callable[[Any, Call], Awaitable[Any]], parse: Callable[[bytes], Any]) -> Any:
        async def guarded(raw: bytes, context: Any) -> Any:
            began, status = time.monotonic(), "OK"
            try:
                tenant = self.keys.tenant_of_call(method, context.invocation_metadata())
                try:
                    request = parse(raw)
                except DecodeError:  # gRPC itself would call this INTERNAL
                    raise InvalidRequest("the request is not a valid message; is every string UTF-8?") from None
                return await call(request, Call(context, tenant))
            except PatchforgeError as error:
                status = error.grpc_status
                return await _abort(context, error)
            except asyncio.CancelledError:  # hung up, cancelled or out of time
                status = "CANCELLED"
                raise
            except TooSlow:
                status = "ABORTED"
                log.info("dropped a client too slow to read its answer", method=method)
                # Python's gRPC cannot reset a stream: this waits behind the one message that is stuck, holding nothing
                # else, until the client reads on or leaves.
                with contextlib.suppress(grpc.aio.InternalError):
                    await context.abort(grpc.StatusCode.ABORTED, "the client is too slow to read its events")
                raise asyncio.CancelledError from None
            except grpc.aio.InternalError:  # it hung up, and the write in progress was the first to know
                status = "CANCELLED"
                raise asyncio.CancelledError from None
            except Exception as error:
                status = "INTERNAL"
                log.error("unexpected error", method=method, exc_info=error)
                return await context.abort(grpc.StatusCode.INTERNAL, "something went wrong on our side")
            finally:
                self.metrics.rpc_answered(method, status, time.monotonic() - began)
                rpc_ended(status)

        async def traced(raw: bytes, context: Any) -> Any:
            with rpc_span(method, context.invocation_metadata()):
                return await guarded(raw, context)

        return traced if tracing.is_on() else guarded


async def _abort(context: Any, error: PatchforgeError) -> Any:
    details = {"error-code": error.code, "error-field": error.field, "retry-after": error.retry_after}
    metadata = tuple((name, str(value)) for name, value in details.items() if value is not None)
    message = error.message if error.field is None else f"{error.field}: {error.message}"
    return await context.abort(grpc.StatusCode[error.grpc_status], message, metadata)


def _refusal(error: Unauthenticated) -> Any:
    """A handler that ends a call of any kind at once."""

    async def refuse(requests: Any, context: Any) -> None:
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)

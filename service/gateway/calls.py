"""What happens around every gRPC call: API key, parsing, errors, metrics and tracing."""

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

from patchforge.service import tracing
from patchforge.service.errors import InvalidRequest, PatchforgeError, Unauthenticated
from patchforge.service.gateway import request_ids
from patchforge.service.gateway.auth import ApiKeys
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.gateway.problems import UNEXPECTED
from patchforge.service.gateway.request_ids import id_of_call
from patchforge.service.gateway.spans import rpc_span, set_rpc_status

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Call:
    """A gRPC call in progress, and the tenant that makes it."""

    context: Any
    tenant: str | None

    async def begin(self) -> None:
        """Opens the response stream.

        gRPC would do so with the first message. But if the client does not read that one, no error could reach it.
        """
        await self.context.send_initial_metadata(())


class ClientTooSlow(Exception):
    """The client does not read its responses."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Wraps every call to our own `services`: checks the key, parses the request, maps errors to statuses, counts.

    Other services, such as reflection, also need a key; only gRPC's health service does not.
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
                self.keys.authenticate_call(details.method, details.invocation_metadata)
            except Unauthenticated as error:
                return _refuse_with(error)
            return handler
        wrapped = self._wrap(details.method, handler.unary_unary or handler.unary_stream, handler.request_deserializer)
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        return make(wrapped, None, handler.response_serializer)

    def _wrap(self, method: str, call: Callable[[Any, Call], Awaitable[Any]], parse: Callable[[bytes], Any]) -> Any:
        async def guarded(raw: bytes, context: Any) -> Any:
            request_id = id_of_call(context.invocation_metadata())
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                context.set_trailing_metadata(((request_ids.HEADER, request_id),))
                return await answer(raw, context, request_id)

        async def answer(raw: bytes, context: Any, request_id: str) -> Any:
            began, status = time.monotonic(), "OK"
            try:
                tenant = self.keys.authenticate_call(method, context.invocation_metadata())
                try:
                    request = parse(raw)
                except DecodeError:  # gRPC itself would answer INTERNAL
                    raise InvalidRequest("the request is not a valid message: is every string UTF-8?") from None
                return await call(request, Call(context, tenant))
            except PatchforgeError as error:
                status = error.grpc_status
                return await _abort(context, error, request_id)
            except asyncio.CancelledError:  # the client disconnected, cancelled, or its deadline passed
                status = "CANCELLED"
                raise
            except ClientTooSlow:
                status = "ABORTED"
                log.info("disconnected a client that did not read its response", method=method)
                # Python's gRPC cannot reset a stream. So this waits behind the one unread message until the client
                # reads on or disconnects; it holds nothing else meanwhile.
                with contextlib.suppress(grpc.aio.InternalError):
                    await context.abort(grpc.StatusCode.ABORTED, "the client reads its responses too slowly")
                raise asyncio.CancelledError from None
            except grpc.aio.InternalError:  # the client disconnected during a write
                status = "CANCELLED"
                raise asyncio.CancelledError from None
            except Exception as error:
                status = "INTERNAL"
                log.error("unexpected error", method=method, exc_info=error)
                return await context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED, ((request_ids.HEADER, request_id),))
            finally:
                self.metrics.record_rpc_response(method, status, time.monotonic() - began)
                set_rpc_status(status)

        async def traced(raw: bytes, context: Any) -> Any:
            with rpc_span(method, context.invocation_metadata()):
                return await guarded(raw, context)

        return traced if tracing.is_on() else guarded


async def _abort(context: Any, error: PatchforgeError, request_id: str | None = None) -> Any:
    details = {"error-code": error.code, "error-field": error.field, "retry-after": error.retry_after}
    details[request_ids.HEADER] = request_id
    metadata = tuple((name, str(value)) for name, value in details.items() if value is not None)
    message = error.message if error.field is None else f"{error.field}: {error.message}"
    return await context.abort(grpc.StatusCode[error.grpc_status], message, metadata)


def _refuse_with(error: Unauthenticated) -> Any:
    """A handler, for calls of any kind, that refuses at once."""

    async def refuse(requests: Any, context: Any) -> None:
        await _abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)

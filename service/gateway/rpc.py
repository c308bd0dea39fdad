"""The gRPC API: ``patchforge.v1.ImageService`` with the standard health and reflection services."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.errors import InvalidRequest, PatchforgeError
from service.gateway.convert import event_to_proto, generation_from_proto, job_to_proto, model_to_proto
from service.gateway.jobs import JobService
from service.metrics import GatewayMetrics
from service.pb.patchforge.v1 import image_service_pb2 as pb
from service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from service.schemas import ImageReady
from service.settings import Settings

SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
MAX_REPLY_BYTES = 64 << 20  # the largest picture anyone will serve, and then some

log = structlog.get_logger(__name__)


class ImageService:
    """One method per RPC, each a few words to :class:`JobService`."""

    def __init__(self, service: JobService, settings: Settings) -> None:
        self.service = service
        self.send_timeout = settings.client_timeout_seconds

    async def GenerateImage(self, request: pb.GenerateImageRequest, context: Any) -> None:
        async with await self.service.run(generation_from_proto(request.generation)) as run:
            async for event_id, event in run:
                reply = pb.GenerateImageResponse(job_id=run.job.id, event=event_to_proto(event_id, event))
                if isinstance(event, ImageReady):
                    reply.event.image.data = await self.service.image(run.job.id, event.index)
                    reply.event.image.content_type = f"image/{run.job.request.output_format}"
                await self._send(context, reply)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> None:
        try:
            events = self.service.watch(request.job_id, request.after_event_id or "0")
        except InvalidRequest as error:
            error.field = "after_event_id"
            raise
        async with self.service.until_drained(), aclosing(events):
            async for event_id, event in events:
                await self._send(context, pb.WatchJobResponse(event=event_to_proto(event_id, event)))

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Any) -> pb.SubmitJobResponse:
        generation = generation_from_proto(request.generation)
        job = await self.service.submit(generation, request.idempotency_key or None)
        return pb.SubmitJobResponse(job=job_to_proto(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=job_to_proto(await self.service.get(request.job_id)))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=job_to_proto(await self.service.cancel(request.job_id)))

    async def GetImage(self, request: pb.GetImageRequest, context: Any) -> pb.GetImageResponse:
        job = await self.service.get(request.job_id)
        picture = await self.service.image(request.job_id, request.index)
        return pb.GetImageResponse(data=picture, content_type=f"image/{job.request.output_format}")

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        cards = await self.service.queue.models()
        return pb.ListModelsResponse(models=[model_to_proto(card) for card in cards])

    async def _send(self, context: Any, reply: Any) -> None:
        """Waits for the client to make room, but not for ever."""
        try:
            async with asyncio.timeout(self.send_timeout):
                await context.write(reply)
        except TimeoutError:
            await context.abort(grpc.StatusCode.ABORTED, "the client is too slow to read its events")


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Around every call to :class:`ImageService`: parses the request, turns errors into statuses, and counts."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self.metrics = metrics

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(f"/{SERVICE}/"):
            return handler
        wrapped = self._wrap(details.method, handler.unary_unary or handler.unary_stream, handler.request_deserializer)
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        return make(wrapped, None, handler.response_serializer)

    def _wrap(self, method: str, call: Callable[[Any, Any], Awaitable[Any]], parse: Callable[[bytes], Any]) -> Any:
        async def guarded(raw: bytes, context: Any) -> Any:
            began, status = time.monotonic(), "OK"
            try:
                try:
                    request = parse(raw)
                except DecodeError:  # gRPC itself would call this INTERNAL
                    raise InvalidRequest("the request is not a valid message; is every string UTF-8?") from None
                return await call(request, context)
            except PatchforgeError as error:
                status = error.grpc_status
                return await _abort(context, error)
            except asyncio.CancelledError:  # hung up, cancelled or out of time
                status = "CANCELLED"
                raise
            except grpc.aio.AbortError:
                status = "ABORTED"
                raise
            except Exception as error:
                status = "INTERNAL"
                log.error("unexpected error", method=method, exc_info=error)
                return await context.abort(grpc.StatusCode.INTERNAL, "something went wrong on our side")
            finally:
                self.metrics.rpc_answered(method, status, time.monotonic() - began)

        return guarded


async def _abort(context: Any, error: PatchforgeError) -> Any:
    details = {"error-code": error.code, "error-field": error.field, "retry-after": error.retry_after}
    metadata = tuple((name, str(value)) for name, value in details.items() if value is not None)
    message = error.message if error.field is None else f"{error.field}: {error.message}"
    return await context.abort(grpc.StatusCode[error.grpc_status], message, metadata)


class RpcServer:
    """The gRPC side of a gateway's life."""

    def __init__(self, service: JobService, metrics: GatewayMetrics, settings: Settings) -> None:
        self.health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[Boundary(metrics)],
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", MAX_REPLY_BYTES),
                ("grpc.keepalive_time_ms", round(1000 * settings.sse_ping_seconds)),
                ("grpc.so_reuseport", 0),  # a second gateway on the same port should fail, not share it
            ],
        )
        pb_grpc.add_ImageServiceServicer_to_server(ImageService(service, settings), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Returns the port bound; 0 asks for any free one."""
        await self.report(serving=False)
        bound: int = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        await self._server.start()
        return bound

    async def report(self, *, serving: bool) -> None:
        """What the health service answers, for the server as a whole and for our service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self.health.set(name, status)

    async def drain(self) -> None:
        await self.health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Lets calls in progress go on for ``grace`` seconds, then cancels them."""
        await self._server.stop(grace)

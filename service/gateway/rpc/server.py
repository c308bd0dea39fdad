"""The gRPC server: `patchforge.v1.ImageService`, open inference, and the standard health and reflection."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.addresses import listen
from patchforge.service.gateway.auth import ApiKeys
from patchforge.service.gateway.calls import Call, CallInterceptor, ClientTooSlow
from patchforge.service.gateway.inference import rpc as inference_rpc
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.gateway.rpc.convert import event_to_proto, generation_from_proto, job_to_proto, model_to_proto
from patchforge.service.gateway.rpc.health import Health
from patchforge.service.gateway.tls import Certificate
from patchforge.service.messages.events import ImageReady
from patchforge.service.pb.inference import grpc_inference_service_pb2_grpc as inference_pb_grpc
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.settings import Settings

SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
SERVICES = (SERVICE, inference_rpc.SERVICE)
MAX_STREAMS = 100  # open calls per connection; the client holds back further ones
MAX_REPLY_BYTES = 64 << 20  # more than any picture
MIN_CHUNK, MAX_CHUNK = 1 << 10, 63 << 20  # what clients may ask for: bytes of a picture in one message
PLAIN_CHUNK = (4 << 20) - (64 << 10)  # fits into 4 MiB, which is what clients take unless they are told otherwise
STREAM_CHUNK = 1 << 20
PING_SECONDS = 1  # clients may ping so often; without this, every five minutes
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


class ImageService:
    """One method per RPC. Each converts messages and calls `JobService`."""

    def __init__(self, service: JobService, settings: Settings) -> None:
        self.service = service
        self.send_timeout = settings.client_timeout_seconds

    async def GenerateImage(self, request: pb.GenerateImageRequest, call: Call) -> None:
        chunk = request.max_chunk_bytes or PLAIN_CHUNK
        if not MIN_CHUNK <= chunk <= MAX_CHUNK:
            raise InvalidRequest(f"must be 0, or {MIN_CHUNK} to {MAX_CHUNK}", field="max_chunk_bytes")
        async with await self.service.run(generation_from_proto(request.generation), call.tenant) as run:
            await call.begin()
            async for event_id, event in run:
                reply = pb.GenerateImageResponse(job_id=run.job.id, event=event_to_proto(event_id, event))
                if isinstance(event, ImageReady):
                    picture = await self.service.image(run.job, event.index)
                    reply.event.image.content_type = f"image/{run.job.request.output_format}"
                    parts = _split(picture, chunk)
                    for number, part in enumerate(parts, 1):
                        reply.event.image.data, reply.event.image.more = part, number < len(parts)
                        await self._send(call, reply)
                    continue
                await self._send(call, reply)

    async def WatchJob(self, request: pb.WatchJobRequest, call: Call) -> None:
        try:
            events = await self.service.watch(request.job_id, call.tenant, request.after_event_id)
        except InvalidRequest as error:
            error.field = "after_event_id"
            raise
        async with self.service.until_drained(), aclosing(events):
            await call.begin()
            async for event_id, event in events:
                await self._send(call, pb.WatchJobResponse(event=event_to_proto(event_id, event)))

    async def SubmitJob(self, request: pb.SubmitJobRequest, call: Call) -> pb.SubmitJobResponse:
        generation = generation_from_proto(request.generation)
        job = await self.service.submit(generation, call.tenant, request.idempotency_key or None)
        return pb.SubmitJobResponse(job=job_to_proto(job))

    async def GetJob(self, request: pb.GetJobRequest, call: Call) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=job_to_proto(await self.service.get(request.job_id, call.tenant)))

    async def CancelJob(self, request: pb.CancelJobRequest, call: Call) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=job_to_proto(await self.service.cancel(request.job_id, call.tenant)))

    async def GetImage(self, request: pb.GetImageRequest, call: Call) -> pb.GetImageResponse:
        job = await self.service.get(request.job_id, call.tenant)
        picture = await self.service.image(job, request.index)
        return pb.GetImageResponse(data=picture, content_type=f"image/{job.request.output_format}")

    async def StreamImage(self, request: pb.StreamImageRequest, call: Call) -> None:
        job = await self.service.get(request.job_id, call.tenant)
        picture = await self.service.image(job, request.index)
        await call.begin()
        reply = pb.StreamImageResponse(content_type=f"image/{job.request.output_format}", total_bytes=len(picture))
        for part in _split(picture, STREAM_CHUNK):
            reply.data = part
            await self._send(call, reply)
            reply.Clear()

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        cards = (await self.service.fleet()).cards
        return pb.ListModelsResponse(models=[model_to_proto(card) for card in cards])

    async def _send(self, call: Call, reply: Any) -> None:
        """Sends a message.

        Raises:
            ClientTooSlow: the client did not read it within `PATCHFORGE_CLIENT_TIMEOUT_SECONDS`.
        """
        try:
            async with asyncio.timeout(self.send_timeout):
                await call.context.write(reply)
        except TimeoutError:
            raise ClientTooSlow from None


def _split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


class RpcServer:
    """Serves all gRPC services from `start` until `stop`."""

    def __init__(
        self,
        service: JobService,
        metrics: GatewayMetrics,
        keys: ApiKeys,
        settings: Settings,
        certificate: Certificate | None = None,
    ) -> None:
        self._certificate = certificate
        self.health = Health(SERVICES)
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(SERVICES, metrics, keys)],
            options=[
                ("grpc.max_receive_message_length", max(settings.max_body_bytes, settings.max_upload_bytes)),
                ("grpc.max_send_message_length", MAX_REPLY_BYTES),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000 * PING_SECONDS),
                ("grpc.keepalive_time_ms", round(1000 * settings.sse_ping_seconds)),
                ("grpc.so_reuseport", 0),  # a second gateway on this port fails instead of sharing it
            ],
        )
        pb_grpc.add_ImageServiceServicer_to_server(ImageService(service, settings), self._server)
        inference_pb_grpc.add_GRPCInferenceServiceServicer_to_server(
            inference_rpc.InferenceService(service), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        _add_reflection(self._server)

    async def start(self, host: str, port: int) -> int:
        """Binds `host` and `port` and returns the port; 0 picks any free one.

        Raises:
            InvalidRequest: the port cannot be used.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        listen(host, port, "PATCHFORGE_GRPC_PORT").close()  # gRPC's own error does not say why
        if self._certificate is None:
            bound: int = self._server.add_insecure_port(address)
        else:
            bound = self._server.add_secure_port(address, self._certificate.grpc_credentials())
        await self._server.start()
        return bound

    async def stop(self, grace: float) -> None:
        """Lets running calls continue for `grace` seconds, then cancels them."""
        await self._server.stop(grace)


def _add_reflection(server: Any) -> None:
    """Adds reflection under its name of today, `v1`, beside the earlier one: their messages are the same."""
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
    reflection.enable_server_reflection(names, server)
    call = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": call})
    server.add_generic_rpc_handlers((handler,))

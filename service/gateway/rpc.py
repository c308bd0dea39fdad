"""The gRPC API: ``patchforge.v1.ImageService`` beside open inference and the standard health and reflection."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.errors import InvalidRequest
from service.events import ImageReady
from service.gateway import inference_rpc
from service.gateway.auth import ApiKeys
from service.gateway.calls import Boundary, Call, TooSlow
from service.gateway.convert import event_to_proto, generation_from_proto, job_to_proto, model_to_proto
from service.gateway.health import Health
from service.gateway.jobs import JobService
from service.gateway.tls import Certificate
from service.metrics import GatewayMetrics
from service.pb.inference import grpc_inference_service_pb2_grpc as inference_pb_grpc
from service.pb.patchforge.v1 import image_service_pb2 as pb
from service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from service.settings import Settings

SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
SERVICES = (SERVICE, inference_rpc.SERVICE)
MAX_STREAMS = 100  # calls one connection has open; further ones wait at the client
MAX_REPLY_BYTES = 64 << 20  # the largest picture anyone will serve, and then some


class ImageService:
    """One method per RPC, each a few words to :class:`JobService`."""

    def __init__(self, service: JobService, settings: Settings) -> None:
        self.service = service
        self.send_timeout = settings.client_timeout_seconds

    async def GenerateImage(self, request: pb.GenerateImageRequest, call: Call) -> None:
        async with await self.service.run(generation_from_proto(request.generation), call.tenant) as run:
            await call.begin()
            async for event_id, event in run:
                reply = pb.GenerateImageResponse(job_id=run.job.id, event=event_to_proto(event_id, event))
                if isinstance(event, ImageReady):
                    reply.event.image.data = await self.service.image(run.job, event.index)
                    reply.event.image.content_type = f"image/{run.job.request.output_format}"
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

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        cards = await self.service.queue.models()
        return pb.ListModelsResponse(models=[model_to_proto(card) for card in cards])

    async def _send(self, call: Call, reply: Any) -> None:
        """Waits for the client to make room, but not for ever."""
        try:
            async with asyncio.timeout(self.send_timeout):
                await call.context.write(reply)
        except TimeoutError:
            raise TooSlow from None


class RpcServer:
    """The gRPC side of a gateway's life."""

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
            interceptors=[Boundary(SERVICES, metrics, keys)],
            options=[
                ("grpc.max_receive_message_length", max(settings.max_body_bytes, settings.max_upload_bytes)),
                ("grpc.max_send_message_length", MAX_REPLY_BYTES),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.keepalive_time_ms", round(1000 * settings.sse_ping_seconds)),
                ("grpc.so_reuseport", 0),  # a second gateway on the same port should fail, not share it
            ],
        )
        pb_grpc.add_ImageServiceServicer_to_server(ImageService(service, settings), self._server)
        inference_pb_grpc.add_GRPCInferenceServiceServicer_to_server(
            inference_rpc.InferenceService(service), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Returns the port bound; 0 asks for any free one."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self._certificate is None:
            bound: int = self._server.add_insecure_port(address)
        else:
            bound = self._server.add_secure_port(address, self._certificate.for_grpc())
        await self._server.start()
        return bound

    async def stop(self, grace: float) -> None:
        """Lets calls in progress go on for ``grace`` seconds, then cancels them."""
        await self._server.stop(grace)

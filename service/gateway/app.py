"""The gateway process: builds the HTTP application and runs the HTTP and gRPC servers from start to shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from patchforge.service import tracing
from patchforge.service.errors import Unavailable
from patchforge.service.gateway import maps, metrics_api, problems, rest, spans
from patchforge.service.gateway.acceptor import raise_file_limit
from patchforge.service.gateway.addresses import reachable
from patchforge.service.gateway.auth import ApiKeys, AuthMiddleware
from patchforge.service.gateway.batches import api as batches_api
from patchforge.service.gateway.batches.feeder import BatchFeeder
from patchforge.service.gateway.body import BodySizeMiddleware
from patchforge.service.gateway.head import HeadMiddleware
from patchforge.service.gateway.http_server import HttpServer
from patchforge.service.gateway.inference import rest as inference_rest
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.gateway.metrics_api import MetricsMiddleware
from patchforge.service.gateway.mixtures import Mixtures
from patchforge.service.gateway.openai import api as openai_api
from patchforge.service.gateway.openapi import Api, add_docs
from patchforge.service.gateway.prefix import PrefixMiddleware
from patchforge.service.gateway.problems import UnexpectedErrorMiddleware
from patchforge.service.gateway.request_ids import RequestIdMiddleware
from patchforge.service.gateway.rpc.server import RpcServer
from patchforge.service.gateway.tls import load_certificate
from patchforge.service.messages.schemas import Job
from patchforge.service.queue import GatewayQueue, connect
from patchforge.service.results.metrics import watch_store
from patchforge.service.settings import Settings

PLAYGROUND = Path(__file__).parent / "playground"
PLAYGROUND_HEADERS = {
    "Cache-Control": "no-cache",  # the browser asks again with the ETag, so an upgrade shows at once
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
TICK = 1.0  # seconds between readiness checks

log = structlog.get_logger(__name__)


def create_app(settings: Settings, service: JobService, metrics: GatewayMetrics, keys: ApiKeys) -> FastAPI:
    """Builds the HTTP application. The caller keeps `service` and must close it."""
    app = Api(
        title="Patchforge",
        version="1",
        description="Patch Forcing image generation: easy regions finish early, hard ones get the compute.",
        separate_input_output_schemas=False,
        docs_url=None,
        redoc_url=None,
        telemetry=spans.HTTP,
    )
    app.state.settings, app.state.service, app.state.metrics = settings, service, metrics
    app.state.grpc_port = settings.grpc_port
    problems.install(app)
    uploads = (rest.uploads, openai_api.uploads, batches_api.uploads, inference_rest.uploads)
    _add_middleware(app, settings, metrics, keys, uploads)
    protocols = (openai_api.router, batches_api.router, inference_rest.router)
    small = (rest.router, rest.jobs, maps.router, *protocols, metrics_api.router)
    for router in (*small, *uploads):
        app.include_router(router)
    add_docs(app)
    _add_playground(app)
    return app


class Playground(StaticFiles):
    """Serves the files of the playground page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PLAYGROUND_HEADERS)
        return response


def _add_middleware(
    app: FastAPI, settings: Settings, metrics: GatewayMetrics, keys: ApiKeys, uploads: Iterable[APIRouter]
) -> None:
    """Adds what every request passes through. What is added last comes first."""
    may_be_large = [route.path_regex for router in uploads for route in router.routes if isinstance(route, APIRoute)]
    app.add_middleware(HeadMiddleware)
    app.add_middleware(
        BodySizeMiddleware, most=settings.max_body_bytes, most_upload=settings.max_upload_bytes, uploads=may_be_large
    )
    app.add_middleware(AuthMiddleware, keys=keys)
    app.add_middleware(UnexpectedErrorMiddleware)
    _add_cors(app, settings)  # before the key check: a browser's preflight request carries no key
    app.add_middleware(MetricsMiddleware, metrics=metrics)  # counts refusals too
    app.add_middleware(PrefixMiddleware, root_path=settings.root_path)
    app.add_middleware(RequestIdMiddleware)


def _add_cors(app: FastAPI, settings: Settings) -> None:
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["ETag", "Location", "Retry-After", "X-Request-Id"],
        )


def _add_playground(app: FastAPI) -> None:
    files = Playground(directory=PLAYGROUND)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    @app.get("/playground/server.json", include_in_schema=False)
    async def server() -> dict[str, Any]:
        # The page shows gRPC code, and knows only its own HTTP address.
        return {"grpc_port": app.state.grpc_port}

    app.mount("/playground", files)


class Gateway:
    """The HTTP and gRPC servers over one queue. Create it inside the event loop.

    Its life is four methods: `startup`, `main_loop`, `tick` and `shutdown`; `serve` calls them.
    """

    def __init__(self, settings: Settings, queue: GatewayQueue) -> None:
        self.settings = settings
        self.service = JobService(queue, settings.default_models, settings.remember_seconds)
        registry = CollectorRegistry()
        self._metrics = metrics = GatewayMetrics(registry, settings.max_waiting * len(queue.shards), len(queue.shards))
        watch_store(queue.objects, registry)

        def record_end(job: Job) -> None:
            metrics.count_request_ended_in_queue(job)
            tracing.ended_in_queue(job)

        queue.on_ended, queue.on_no_room = record_end, metrics.count_refusal_for_memory
        keys = ApiKeys(settings.api_keys)
        certificate = load_certificate(settings)
        self.app = create_app(settings, self.service, metrics, keys)
        self.http = HttpServer(self.app, settings, certificate)
        self.rpc = RpcServer(self.service, metrics, keys, settings, certificate)
        self._feeders = [BatchFeeder(self.service, shard, metrics) for shard in queue.shards]
        self._feeding: list[asyncio.Task[None]] = []
        self.http_port = self.grpc_port = 0
        self._mixtures = Mixtures()
        self._stopping = asyncio.Event()
        self._reason: str | None = ""  # why the gateway is not ready; None when it is

    async def serve(self) -> None:
        """Runs until `stop` is called."""
        try:
            await self.startup()
            await self.main_loop()
        finally:
            await self.shutdown()

    def stop(self) -> None:
        self._stopping.set()

    async def startup(self) -> None:
        """Binds both ports. The queue server may still be away: readiness reports that."""
        host = self.settings.host
        self.http_port = await self.http.start(host, self.settings.http_port)
        self.grpc_port = await self.rpc.start(host, self.settings.grpc_port)
        self.app.state.grpc_port = self.grpc_port
        self._feeding = [asyncio.create_task(feeder.run()) for feeder in self._feeders]
        log.info(
            "gateway is listening",
            http=f"{'https' if self.http.config.is_ssl else 'http'}://{reachable(host, self.http_port)}",
            grpc=reachable(host, self.grpc_port),
            host=host,
            api_keys=len(self.settings.api_keys),
        )

    async def main_loop(self) -> None:
        while not self._stopping.is_set():
            await self.tick()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), TICK)

    async def tick(self) -> None:
        """Checks readiness, reports it to gRPC's health service, and logs changes."""
        # Together, so that a tick waits only once for a queue server that does not answer.
        reason, _ = await asyncio.gather(self._look_at_fleet(), self._tell_lost_jobs())
        if reason != self._reason:
            self._reason = reason
            log.info("ready for requests") if reason is None else log.warning("not ready", reason=reason)
        self.rpc.health.report(serving=reason is None)

    async def _look_at_fleet(self) -> str | None:
        """Returns why the gateway is not ready, or None."""
        try:
            fleet = await self.service.ready()
            self._mixtures.look(fleet)
            await self.service.remembered.note(fleet)
        except Unavailable as error:
            return error.message
        return None

    async def _tell_lost_jobs(self) -> None:
        with contextlib.suppress(Unavailable):
            for job_id in await self.service.queue.lost_jobs():
                log.error("a failover lost an accepted job", job=job_id)
                self._metrics.count_lost_job()

    async def shutdown(self) -> None:
        """Reports not ready, ends event watches, gives running calls `drain_seconds`, then closes everything."""
        if self.grpc_port:  # else it never listened
            log.info("gateway is shutting down")
        for feeder in self._feeders:
            feeder.stop()
        self.service.drain()
        self.rpc.health.drain()
        await asyncio.gather(self.http.stop(), self.rpc.stop(self.settings.drain_seconds))
        await asyncio.gather(*self._feeding)
        await self.service.aclose()


async def serve_gateway(settings: Settings) -> None:
    """Runs a gateway until SIGTERM or SIGINT.

    Raises:
        Unavailable: no queue server is configured.
        QueueRefused: it refuses this process.
        ResultsRefused: the object store does.
        InvalidRequest: the TLS certificate or key, the address or a port cannot be used.
    """
    if not settings.queue_urls:
        raise Unavailable("REDIS_URL is not set: give the queue server, or run `patchforge serve`, which starts one")
    raise_file_limit()
    queue = connect(settings)
    gateway = Gateway(settings, queue)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, gateway.stop)
    try:
        await queue.check_not_refused()
        await gateway.serve()
    finally:
        await queue.close()

"""A gateway from start to end: the HTTP application, and the life of the process that serves it next to gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service import tracing
from service.errors import Unavailable
from service.gateway import inference_rest, maps, openai_api, problems, rest, spans, telemetry
from service.gateway.auth import ApiKeys, Authenticated
from service.gateway.http_server import HttpServer
from service.gateway.jobs import JobService
from service.gateway.openapi import Api, add_docs
from service.gateway.rpc import RpcServer
from service.gateway.telemetry import Measured
from service.gateway.tls import certificate
from service.metrics import GatewayMetrics
from service.queue import JobQueue
from service.schemas import Job
from service.settings import Settings

PLAYGROUND = Path(__file__).parent / "playground"
PLAYGROUND_HEADERS = {
    "Cache-Control": "no-cache",  # revalidated by ETag, so that an upgrade shows at once
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
TICK = 1.0  # seconds between looks at whether requests can be served

log = structlog.get_logger(__name__)


def create_app(settings: Settings, service: JobService, metrics: GatewayMetrics, keys: ApiKeys) -> FastAPI:
    """The HTTP application; whoever serves it closes ``service``."""
    app = Api(
        title="Patchforge",
        version="1",
        description="Patch Forcing image generation: easy regions finish early, hard ones get the compute.",
        max_body_size=settings.max_body_bytes,
        separate_input_output_schemas=False,
        docs_url=None,
        redoc_url=None,
        telemetry=spans.HTTP,
    )
    app.state.settings, app.state.service, app.state.metrics = settings, service, metrics
    app.state.grpc_port = settings.grpc_port
    problems.install(app)
    app.add_middleware(Authenticated, keys=keys)
    _add_cors(app, settings)  # outside of it, for a browser asks first, and without a key
    app.add_middleware(Measured, metrics=metrics)  # added last, it is outermost, and counts refusals too
    for router in (rest.router, rest.jobs, maps.router, openai_api.router, inference_rest.router, telemetry.router):
        app.include_router(router)
    for router in (rest.uploads, openai_api.uploads, inference_rest.uploads):
        app.include_router(router, max_body_size=settings.max_upload_bytes)
    add_docs(app)
    _add_playground(app)
    return app


class Playground(StaticFiles):
    """The files of the browser page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PLAYGROUND_HEADERS)
        return response


def _add_cors(app: FastAPI, settings: Settings) -> None:
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["ETag", "Location", "Retry-After"],
        )


def _add_playground(app: FastAPI) -> None:
    files = Playground(directory=PLAYGROUND)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    @app.get("/playground/server.json", include_in_schema=False)
    async def server() -> dict[str, Any]:
        # For the page's snippets: it knows only where it came from itself.
        return {"grpc_port": app.state.grpc_port}

    app.mount("/playground", files)


class Gateway:
    """Both servers over one queue: startup, main loop, tick, shutdown. Make it inside the event loop."""

    def __init__(self, settings: Settings, queue: JobQueue) -> None:
        self.settings = settings
        self.service = JobService(queue)
        metrics = GatewayMetrics(CollectorRegistry(), settings.max_waiting)

        def ended_in_queue(job: Job) -> None:
            metrics.request_ended_in_queue(job)
            tracing.ended_in_queue(job)

        queue.on_ended = ended_in_queue
        keys = ApiKeys(settings.api_keys)
        shown = certificate(settings)
        self.app = create_app(settings, self.service, metrics, keys)
        self.http = HttpServer(self.app, settings, shown)
        self.rpc = RpcServer(self.service, metrics, keys, settings, shown)
        self.http_port = self.grpc_port = 0
        self._stopping = asyncio.Event()
        self._reason: str | None = ""  # why requests cannot be served, None if they can

    async def serve(self) -> None:
        """Runs until :meth:`stop`."""
        try:
            await self.startup()
            await self.main_loop()
        finally:
            await self.shutdown()

    def stop(self) -> None:
        self._stopping.set()

    async def startup(self) -> None:
        """Binds both ports. The queue need not be there yet: readiness tells."""
        host = self.settings.host
        self.http_port = await self.http.start(host, self.settings.http_port)
        self.grpc_port = await self.rpc.start(host, self.settings.grpc_port)
        self.app.state.grpc_port = self.grpc_port
        log.info(
            "gateway is listening",
            http=f"{'https' if self.http.config.is_ssl else 'http'}://{host}:{self.http_port}",
            grpc=f"{host}:{self.grpc_port}",
            api_keys=len(self.settings.api_keys),
        )

    async def main_loop(self) -> None:
        while not self._stopping.is_set():
            await self.tick()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), TICK)

    async def tick(self) -> None:
        """Keeps gRPC's health service in step with ``/readyz``, and the log with both."""
        reason = None
        try:
            await self.service.ready()
        except Unavailable as error:
            reason = error.message
        if reason != self._reason:
            self._reason = reason
            log.info("ready for requests") if reason is None else log.warning("not ready", reason=reason)
        self.rpc.health.report(serving=reason is None)

    async def shutdown(self) -> None:
        """Unready first; watches end, calls in progress get ``drain_seconds``, then everything closes."""
        log.info("gateway is shutting down")
        self.service.drain()
        self.rpc.health.drain()
        await asyncio.gather(self.http.stop(), self.rpc.stop(self.settings.drain_seconds))
        await self.service.aclose()


async def serve_gateway(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    if settings.redis_url is None:
        raise Unavailable("no queue server: set REDIS_URL, or use `patchforge serve`, which brings its own")
    queue = JobQueue.connect(settings.redis_url, settings)
    gateway = Gateway(settings, queue)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, gateway.stop)
    try:
        await gateway.serve()
    finally:
        await queue.close()

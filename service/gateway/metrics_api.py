"""`GET /metrics` for Prometheus, and the middleware that counts HTTP responses."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchforge.service.errors import Unavailable
from patchforge.service.gateway.answers import problems, success
from patchforge.service.gateway.dependencies import AppSettings, Metrics, Service
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.metrics import GatewayMetrics, QueueState, ServerState
from patchforge.service.queue import JobQueue
from patchforge.service.threads import in_thread

router = APIRouter(tags=["operation"])


@router.get(
    "/metrics",
    response_class=Response,
    responses=success("text/plain", "Metrics in Prometheus's text format.") | problems(413, 422),
)
async def scrape(
    service: Service,
    metrics: Metrics,
    settings: AppSettings,
    workers: Annotated[
        bool | None,
        Query(description="Whether the workers' metrics are added. Otherwise the server's settings say it."),
    ] = None,
) -> Response:
    """Prometheus metrics of this gateway and of the queue; if wanted, those of all live workers are added."""
    texts: list[bytes] = []
    try:
        metrics.set_queue_state(await _read_queue_state(service))
        if settings.metrics_of_workers if workers is None else workers:
            texts = [text for _, text in await service.queue.worker_metrics()]
    except Unavailable:
        metrics.set_queue_state(None)  # without a queue server, the gateway's own metrics matter most
    # Adding up what many workers measured takes long; meanwhile, the gateway must answer others.
    return Response(await in_thread(metrics.exposition, texts), media_type=CONTENT_TYPE_LATEST)


async def _read_queue_state(service: JobService) -> QueueState:
    queue = service.queue
    (backlog, held, batches), (workers, remembered), servers = await asyncio.gather(
        asyncio.gather(queue.backlog(), queue.held(), queue.count_batches()),
        asyncio.gather(queue.workers(), service.remembered.read()),
        asyncio.gather(*map(_read_server_state, queue.shards)),
    )
    served = [[(card.name, card.digest) for card in each.cards] for each in workers.values()]
    asleep = Fleet(workers.values(), remembered=remembered).asleep
    return QueueState(backlog.jobs, held, backlog.oldest, served, asleep, batches, servers)


async def _read_server_state(queue: JobQueue) -> ServerState | None:
    """Returns the state of one queue server; None if it is away."""
    try:
        memory, (replicas, behind) = await asyncio.gather(queue.memory(), queue.replication())
    except Unavailable:
        return None
    return ServerState(memory, replicas, behind)


class MetricsMiddleware:
    """ASGI middleware that counts and times responses by route template, never by path: paths are unbounded."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            route = getattr(scope.get("route"), "path_format", None)
            self.metrics.record_http_response(scope["method"], route, status, time.monotonic() - began)

"""What a gateway tells Prometheus: every HTTP answer it gave, its queue, and its workers' own figures."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Unavailable
from service.gateway.answers import problems, success
from service.gateway.dependencies import Metrics, Service
from service.metrics import GatewayMetrics, QueueState
from service.queue import JobQueue

router = APIRouter(tags=["operation"])


@router.get(
    "/metrics",
    response_class=Response,
    responses=success("text/plain", "What Prometheus reads.") | problems(413, 422),
)
async def scrape(
    service: Service,
    metrics: Metrics,
    workers: Annotated[bool, Query(description="Off: leave the workers' figures to a scrape of their own.")] = True,
) -> Response:
    """Prometheus metrics of this gateway, of the queue and of every live worker."""
    texts: list[bytes] = []
    try:
        metrics.queue_seen(await _queue_state(service.queue))
        if workers:
            texts = [text for _, text in await service.queue.worker_metrics()]
    except Unavailable:
        metrics.queue_seen(None)  # the gateway's own figures matter most when the queue is away
    return Response(metrics.exposition(texts), media_type=CONTENT_TYPE_LATEST)


async def _queue_state(queue: JobQueue) -> QueueState:
    waiting, oldest, workers, (memory, limit) = await asyncio.gather(
        queue.waiting(), queue.oldest_waiting(), queue.workers(), queue.memory()
    )
    served = [[card.name for card in cards] for cards in workers.values()]
    return QueueState(waiting, oldest, served, memory, limit)


class Measured:
    """ASGI middleware that counts and times answers by the route they came from, never by the path asked for."""

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
            self.metrics.http_answered(scope["method"], route, status, time.monotonic() - began)

"""A connection that the server closed while it lay idle costs no one their request."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from service.queue import JobQueue
from tests.service.queue_kit import eventually


async def test_closed_connections_are_replaced_before_use(queue: JobQueue, redis_client: Redis) -> None:
    await asyncio.gather(*(queue.ping() for _ in range(10)))
    assert await queue.claim("w", ["emoji"], block_seconds=0.01) is None  # a blocking one, too
    clients = await redis_client.client_list()
    assert len(clients) > 5
    closed = await redis_client.client_kill_filter(skipme=True)
    assert closed == len(clients) - 1

    async def gone() -> bool:
        return len(await redis_client.client_list()) == 1

    await eventually(gone)  # and on the way here, our side has heard of it
    await asyncio.gather(*(queue.ping() for _ in range(10)))
    assert await queue.claim("w", ["emoji"], block_seconds=0.01) is None

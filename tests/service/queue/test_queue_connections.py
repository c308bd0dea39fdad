"""A connection that the server closed while it was idle costs no request."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import QueueRefused
from patchforge.service.gateway.source_pictures import Source
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.service.queue.kit import DONE, a_card, a_preview, a_request, eventually


async def test_closed_connections_are_replaced_before_use(queue: JobQueue, redis_client: Redis) -> None:
    await asyncio.gather(*(queue.ping() for _ in range(10)))
    assert await queue.claim("w", ["emoji"], block_seconds=0.01) is None  # uses the blocking connection too
    clients = await redis_client.client_list()
    assert len(clients) > 5
    closed = await redis_client.client_kill_filter(skipme=True)
    assert closed == len(clients) - 1

    async def gone() -> bool:
        return len(await redis_client.client_list()) == 1

    await eventually(gone)  # and our side has learnt of it
    await asyncio.gather(*(queue.ping() for _ in range(10)))
    assert await queue.claim("w", ["emoji"], block_seconds=0.01) is None


async def test_the_documented_user_may_do_all_that_is_needed(
    queue_server: EmbeddedServer, redis_client: Redis, settings: Settings
) -> None:
    """docs/troubleshooting.md names the ACL; a user with less is told so."""
    page = (Path(__file__).parents[3] / "docs" / "troubleshooting.md").read_text("utf-8")
    [rules] = re.findall(r"`ACL SETUSER name (.+?)`", page)
    await redis_client.execute_command("ACL", "SETUSER", "patchforge", "on", ">secret", *rules.split())
    queue = JobQueue.connect(queue_server.url.replace("//", "//patchforge:secret@"), settings)
    try:
        await queue.check_server()
        job = await queue.submit(a_request(image="sha256:x"), idempotency_key="k", source=Source(b"png", None))
        await queue.announce("w", [a_card("emoji")])
        await queue.announce_metrics("w", b"x 1")
        assert await queue.workers()
        assert await queue.worker_metrics()
        claim = await queue.claim("w", ["emoji"], block_seconds=1)
        assert claim is not None
        assert (await queue.source(job.id)).image == b"png"
        await queue.heartbeat(claim)
        await queue.publish(claim, a_preview(1))
        await queue.store_image(claim, 0, b"png")
        assert await queue.finish(claim, DONE)
        assert [event.type async for _, event in queue.watch(job.id)][-1] == "completed"
        assert await queue.image(job.id, 0) == b"png"
        await queue.waiting(), await queue.oldest_waiting(), await queue.memory(), await queue.reclaim("w", ["emoji"])
        await queue.cancel(job.id), await queue.retire("w")
        await redis_client.execute_command("ACL", "SETUSER", "patchforge", "-xadd")
        with pytest.raises(QueueRefused, match="ACL SETUSER"):
            await queue.submit(a_request())
    finally:
        await queue.close()
        await redis_client.execute_command("ACL", "DELUSER", "patchforge")

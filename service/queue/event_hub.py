"""Wakes this process's watchers when their job has news, over one pub/sub connection.

A bell carries no content: the watcher reads the job's event stream from its own position. So a slow watcher needs no
memory here. If a bell is lost with the connection, its watcher is later, but misses no event: watchers also poll.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from redis.asyncio import Redis
from redis.exceptions import RedisError

from patchforge.service.queue import keys
from patchforge.service.queue.connection import unlost_cancellation

RECONNECT = 0.5  # seconds between attempts to subscribe


class EventHub:
    """Has one listener task. It starts with the first watcher and ends with `close`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._listener: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def listen(self, job_id: str) -> Iterator[asyncio.Event]:
        """Yields a bell that rings at each event of the job, and sometimes without one."""
        if self._listener is None:
            self._listener = asyncio.create_task(self._keep_listening())
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        try:
            yield bell
        finally:
            self._bells[job_id].remove(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    async def _keep_listening(self) -> None:
        while True:
            with contextlib.suppress(RedisError, OSError):
                await self._listen()
            await asyncio.sleep(RECONNECT)

    async def _listen(self) -> None:
        async with self._redis.pubsub() as subscription:
            with unlost_cancellation():
                await subscription.subscribe(keys.NEWS)
            async for message in subscription.listen():
                if message["type"] == "message":
                    self._ring(message["data"].decode())
                else:  # Just subscribed: bells before this moment were missed.
                    for job_id in self._bells:
                        self._ring(job_id)

    def _ring(self, job_id: str) -> None:
        for bell in self._bells.get(job_id, ()):
            bell.set()

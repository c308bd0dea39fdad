"""Wakes this process's watchers when their job has news, over one pub/sub connection.

A bell carries no content: the watcher reads the job's event stream from its own position. So a slow watcher needs no
memory here. If a bell is lost with the connection, its watcher is later, but misses no event: watchers also poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Iterator

from redis.asyncio import Redis
from redis.exceptions import RedisError

from patchforge.service.queue import keys
from patchforge.service.queue.connection import unlost_cancellation

RECONNECT = 0.5  # seconds between attempts to subscribe
REMEMBERED = 1024  # jobs whose last bell is known


class EventHub:
    """Has one listener task. It starts with the first watcher and ends with `close`."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._rung: OrderedDict[str, float] = OrderedDict()
        """Jobs that rang a moment ago → when; oldest first."""
        self._all_since = math.inf
        """Every bell since then is in `_rung`; infinite while nobody listens."""
        self._fleet_changed = -math.inf

    def may_have_rung(self, job_id: str, since: float) -> bool:
        """Returns False only if the job had no event since that time, by the monotonic clock."""
        return since <= self._all_since or self._rung.get(job_id, -math.inf) >= since

    def fleet_known_since(self) -> float:
        """Returns when the announcements last changed, as far as was told; infinite while nobody listens."""
        self._begin()
        return self._fleet_changed if self._all_since < math.inf else math.inf

    def _begin(self) -> None:
        if self._listener is None:
            self._listener = asyncio.create_task(self._keep_listening())

    @contextlib.contextmanager
    def listen(self, job_id: str) -> Iterator[asyncio.Event]:
        """Yields a bell that rings at each event of the job, and sometimes without one."""
        self._begin()
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
                try:
                    await self._listen()
                finally:
                    self._all_since = math.inf
            await asyncio.sleep(RECONNECT)

    async def _listen(self) -> None:
        async with self._redis.pubsub() as subscription:
            with unlost_cancellation():
                await subscription.subscribe(keys.NEWS)
            async for message in subscription.listen():
                if message["type"] != "message":  # Just subscribed: bells before this moment were missed.
                    self._all_since = self._fleet_changed = time.monotonic()
                    for job_id in self._bells:
                        self._ring(job_id)
                elif (told := message["data"].decode()) == keys.FLEET_NEWS:
                    self._fleet_changed = time.monotonic()
                else:
                    self._note(told)
                    self._ring(told)

    def _note(self, job_id: str) -> None:
        self._rung[job_id] = time.monotonic()
        self._rung.move_to_end(job_id)
        if len(self._rung) > REMEMBERED:
            self._all_since = max(self._all_since, self._rung.popitem(last=False)[1])

    def _ring(self, job_id: str) -> None:
        for bell in self._bells.get(job_id, ()):
            bell.set()

"""What the live workers serve, kept in this process and read again only where it changed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from patchforge.service.queue import keys
from patchforge.service.queue.records import Served, served_from

if TYPE_CHECKING:
    from patchforge.service.queue.job_queue import JobQueue

READ_AGAIN = 5.0
"""Seconds after which everything is read again: a worker that died says nothing, nor do workers before this version."""


class Roster:
    """The live workers, as far as one process knows them.

    A version counter in the queue server counts the changes of all announcements. While it stays the same, one small
    command tells that what is known is current.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._served: dict[str, Served] = {}
        self._version: bytes | None = None
        self._read_at = -math.inf
        self._reading = asyncio.Lock()

    async def read(self, within: float = 0.0) -> Mapping[str, Served]:
        """Returns worker id → what it serves. `within`: see `JobQueue.known_workers`.

        Raises:
            Unavailable: the queue server does not answer.
        """
        version = await self._ask_version(within)
        if not self._is_current(version):
            async with self._reading:
                if not self._is_current(version):  # otherwise another call has just read it
                    await self._read_changes(version)
        return self._served

    async def _ask_version(self, within: float) -> bytes | None:
        now = time.monotonic()
        asked_at, version = self._queue._fleet_version
        if within <= 0 or asked_at < max(now - within, self._queue._hub.fleet_known_since()):
            version = await self._queue._do("GET", keys.FLEET)
            self._queue._fleet_version = now, version
        return version

    def _is_current(self, version: bytes | None) -> bool:
        if self._version is None or version is None or time.monotonic() - self._read_at > READ_AGAIN:
            return False
        return int(version) <= int(self._version)

    async def _read_changes(self, version: bytes | None) -> None:
        old = self._version is None or version is None or time.monotonic() - self._read_at > READ_AGAIN
        if old:
            # The version was read before, so a change in between is read once more later.
            self._read_at, self._served, self._version = time.monotonic(), await self._queue.workers(), version
            return
        version, rows = await self._queue._run("changes", self._version)
        served = dict(self._served)
        for worker, cards, announcement in rows:
            if cards:
                served[worker.decode(errors="replace")] = served_from(cards, announcement or b"")
            else:
                served.pop(worker.decode(errors="replace"), None)
        self._served, self._version = served, version

"""Inspects Redis during a soak: how every accepted job ended, that it ended once, and which keys never expire."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from patchforge.service.errors import Unavailable
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import keys
from patchforge.service.soak.ledger import TERMINAL, Ledger
from patchforge.service.threads import in_thread

SCAN_SECONDS = 1.0
LASTING = (
    *(keys.QUEUE, keys.STREAMS, keys.WORKERS, keys.REMEMBERED, keys.WAITING, keys.RESERVED, keys.DEAD_LETTERS),
    keys.SERVER,
)
"""Keys that may lack an expiry: one stream per model and class, and lists of bounded length."""


class Audit:
    """Finds every job in Redis itself, because some clients hang up before they get the job's id."""

    def __init__(self, connect: Callable[[], Redis], ledger: Ledger, kept: float) -> None:
        """`connect` returns a client of the server that is the master now; ended jobs are kept for `kept` seconds."""
        self.ledger = ledger
        self.ended: dict[str, str] = {}
        """Final status of every ended job."""
        self.live: dict[str, str] = {}
        """Status of every other job at the last scan."""
        self.dead_letters: set[str] = set()
        self.undone: set[str] = set()
        """Jobs whose end a failover took back, because no replica had it yet; they must end again."""
        self._last: dict[str, bytes] = {}
        self._seen: dict[str, float] = {}
        self._doubted: set[str] = set()
        self._connect, self._kept = connect, kept
        self._redis: Redis | None = None

    @property
    def accepted(self) -> set[str]:
        return self.ledger.accepted | self.ended.keys() | self.live.keys()

    @property
    def lost(self) -> set[str]:
        """Accepted jobs that have not ended; after a soak, these are lost."""
        return self.accepted - self.ended.keys()

    def count(self, status: str) -> int:
        return sum(1 for ended in self.ended.values() if ended == status)

    async def run(self) -> None:
        """Scan until cancelled; while the server is away, try again later."""
        while True:
            await in_thread(self.try_to_scan)
            await asyncio.sleep(SCAN_SECONDS)

    def try_to_scan(self) -> bool:
        """Scan all jobs once; False if the server was away."""
        try:
            redis = self._connect()
            found = {key.decode().removeprefix(keys.JOB) for key in redis.scan_iter(f"{keys.JOB}*", count=1000)}
            if self._redis not in (None, redis):
                self._forget_recent()
            self._redis = redis
            self._check_ended(redis, found & self.ended.keys())
            self.live = {}
            for job_id in found - self.ended.keys():
                self._check_job(redis, job_id)
        except (RedisError, OSError, Unavailable):
            return False
        self.undone |= self._doubted & self.live.keys()
        self._doubted.clear()
        return True

    def lasting_keys(self) -> Counter[str]:
        """Number of keys without an expiry, by kind, of entries in queue streams, and of reserved bytes."""
        counted: Counter[str] = Counter()
        redis = self._connect()
        for raw in redis.scan_iter("*", count=1000):
            key = raw.decode()
            kind = key.removeprefix(f"{keys.TAG}:").partition(":")[0]
            if redis.ttl(raw) == -1:
                counted[kind] += 1
                if not key.startswith(LASTING):
                    self.ledger.broken.append(f"{key} never expires")
            if kind == "queue":
                counted["queue entries"] += int(redis.xlen(raw))
        counted["reserved bytes"] = int(redis.hget(keys.RESERVED, "total") or 0)
        return counted

    def reserved(self) -> list[str]:
        """Keys of the jobs for which memory is still reserved.

        Raises:
            Unavailable, RedisError: the server is away.
        """
        found: Any = self._connect().hkeys(keys.RESERVED)
        return [key.decode() for key in found if key != b"total"]

    async def await_review(self, look: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Wait until no memory is reserved: an older version ends jobs and leaves their reservations to a review.

        `look` asks a gateway of this version for the queue server's memory, which is such a review. What is still
        reserved after `seconds` stays for the verdict.
        """
        give_up = time.monotonic() + seconds
        while await in_thread(self.reserved) and time.monotonic() < give_up:
            await look()
            await asyncio.sleep(SCAN_SECONDS)

    def used_memory(self) -> int:
        """Bytes that the server uses; 0 if it is away."""
        try:
            return int(self._connect().info("memory")["used_memory"])
        except (RedisError, OSError, Unavailable):
            return 0

    def _forget_recent(self) -> None:
        """After a failover, reads anew what has just ended: the new master may not have got the last writes.

        What ended earlier has been replicated, and may expire at any moment.
        """
        recent = time.monotonic() - self._kept / 2
        for job_id in [each for each in self.ended if self._seen[each] > recent]:
            self._doubted.add(job_id)
            del self.ended[job_id]

    def _check_job(self, redis: Redis, job_id: str) -> None:
        status_now, last, error, entries = _read_job(redis, job_id)
        if status_now is None:
            return  # it expired a moment ago
        status = status_now.decode()
        kinds = [json.loads(fields[b"event"])["type"] for _, fields in entries]
        terminal = [kind for kind in kinds if kind in TERMINAL]
        if status not in TERMINAL:
            self.live[job_id] = status
            self._seen.pop(job_id, None)
            if terminal:
                self.ledger.broken.append(f"{job_id} is {status} and has a terminal event: {terminal}")
            return
        self.ended[job_id] = status
        self._last[job_id] = last
        self._seen.setdefault(job_id, time.monotonic())
        if terminal != [status] or kinds[-1] != status:
            self.ledger.broken.append(f"{job_id} is {status} with terminal events {terminal}")
        if status == JobStatus.FAILED.value and json.loads(error)["code"] == "dead_letter":
            self.dead_letters.add(job_id)

    def _check_ended(self, redis: Redis, job_ids: set[str]) -> None:
        """Check that no event follows a terminal event."""
        order = sorted(job_ids)
        with redis.pipeline(transaction=False) as pipeline:
            for job_id in order:
                pipeline.xrevrange(keys.events(job_id), count=1)
            for job_id, newest in zip(order, pipeline.execute(), strict=True):
                if newest and newest[0][0] != self._last[job_id]:
                    self.ledger.broken.append(f"{job_id} had an event after its terminal event")


def _read_job(redis: Redis, job_id: str) -> tuple[Any, Any, Any, Any]:
    """Status, last event id, error and events, in one transaction so that no event can come in between."""
    with redis.pipeline(transaction=True) as pipeline:
        pipeline.hmget(keys.job(job_id), "status", "last_event", "error")
        pipeline.xrange(keys.events(job_id))
        (status, last, error), entries = pipeline.execute()
    return status, last, error, entries

"""Looks into Redis all the while: how each accepted job ended, that it ended once, and what is kept for ever."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from service import keys
from service.schemas import JobStatus
from service.soak.ledger import TERMINAL, Ledger
from service.threads import in_thread

LOOK_SECONDS = 1.0
TIMEOUT = 2.0
LASTING = (keys.QUEUE, keys.WORKERS, keys.WAITING, keys.DEAD_LETTERS)
"""What may be without an expiry: a stream for each model and class, and three lists that others bound."""


class Audit:
    """Every job there ever was, found in Redis itself: some of its clients hung up before they were told."""

    def __init__(self, url: str, ledger: Ledger) -> None:
        self.ledger = ledger
        self.ended: dict[str, str] = {}
        """How each job ended."""
        self.live: dict[str, str] = {}
        """Those that have not, as of the last look."""
        self.missing: set[str] = set()
        """Accepted, not ended, and nowhere to be found."""
        self.dead_letters = 0
        self._last: dict[str, bytes] = {}
        self._redis = Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)

    @property
    def accepted(self) -> set[str]:
        return self.ledger.accepted | self.ended.keys() | self.live.keys()

    def count(self, status: str) -> int:
        return sum(1 for ended in self.ended.values() if ended == status)

    async def run(self) -> None:
        """Until cancelled. A server that is away is looked at again later."""
        while True:
            await in_thread(self.try_to_look)
            await asyncio.sleep(LOOK_SECONDS)

    def try_to_look(self) -> bool:
        """One look at all jobs; False if the server was away."""
        try:
            told = set(self.ledger.accepted)  # before the look, so that whatever is in it must be found
            found = {key.decode().removeprefix(keys.JOB) for key in self._redis.scan_iter(f"{keys.JOB}*", count=1000)}
            self._check_ended(found & self.ended.keys())
            self.live = {}
            for job_id in found - self.ended.keys():
                self._look_at(job_id)
        except (RedisError, OSError):
            return False
        self.missing = told - found - self.ended.keys()
        return True

    def lasting_keys(self) -> Counter[str]:
        """Keys without an expiry by kind, entries of queue streams, and claims that no one holds any more."""
        counted: Counter[str] = Counter()
        for raw in self._redis.scan_iter("*", count=1000):
            key = raw.decode()
            kind = key.removeprefix(f"{keys.TAG}:").partition(":")[0]
            if self._redis.ttl(raw) == -1:
                counted[kind] += 1
                if not key.startswith(LASTING):
                    self.ledger.blame(f"{key} would be kept for ever")
            if kind == "queue":
                counted["queue entries"] += int(self._redis.xlen(raw))
        return counted

    def used_memory(self) -> int:
        """Bytes the server uses, or 0 if it is away."""
        try:
            return int(self._redis.info("memory")["used_memory"])
        except (RedisError, OSError):
            return 0

    def close(self) -> None:
        self._redis.close()

    def _look_at(self, job_id: str) -> None:
        # Together, or an event could come between.
        status_now, last, error, entries = self._together(job_id)
        if status_now is None:
            return  # it lapsed just now
        status = status_now.decode()
        kinds = [json.loads(fields[b"event"])["type"] for _, fields in entries]
        terminal = [kind for kind in kinds if kind in TERMINAL]
        if status not in TERMINAL:
            self.live[job_id] = status
            if terminal:
                self.ledger.blame(f"{job_id} is {status} and has a terminal event: {terminal}")
            return
        self.ended[job_id] = status
        self._last[job_id] = last
        if terminal != [status] or kinds[-1] != status:
            self.ledger.blame(f"{job_id} is {status} with terminal events {terminal}")
        if status == JobStatus.FAILED.value and json.loads(error)["code"] == "dead_letter":
            self.dead_letters += 1

    def _together(self, job_id: str) -> tuple[Any, Any, Any, Any]:
        with self._redis.pipeline(transaction=True) as look:
            look.hmget(keys.job(job_id), "status", "last_event", "error")
            look.xrange(keys.events(job_id))
            (status, last, error), entries = look.execute()
        return status, last, error, entries

    def _check_ended(self, job_ids: set[str]) -> None:
        """Nothing may follow a terminal event."""
        order = sorted(job_ids)
        with self._redis.pipeline(transaction=False) as look:
            for job_id in order:
                look.xrevrange(keys.events(job_id), count=1)
            for job_id, newest in zip(order, look.execute(), strict=True):
                if newest and newest[0][0] != self._last[job_id]:
                    self.ledger.blame(f"{job_id} had an event after its terminal one")

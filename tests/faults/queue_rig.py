"""A real queue server that tests may kill, two connections to it, and a snapshot of everything in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import NotFound, ResultsUnavailable, Unavailable
from patchforge.service.messages.protocol import CAPABILITIES
from patchforge.service.queue import JobQueue, keys
from patchforge.service.queue.claims import Claim, claim_from
from patchforge.service.queue.roster import Roster
from patchforge.service.results import Reference
from patchforge.service.settings import Settings
from tests.patience import PATIENCE

T = TypeVar("T")

CAP, MAX_ATTEMPTS, IDLE_MS = 4, 3, 3_600_000
MEMORY = 1 << 40
"""That the queue server may hold: next to it, what it does hold is nothing."""
BATCH_IN_FLIGHT = 1
PREFIXES = (keys.JOB, keys.EVENTS, keys.IMAGES, keys.QUEUE)

# Everything about the given jobs, the waiting list and the queues, in one atomic call.
SNAPSHOT = """
local jobs, queues = {}, {}
for _, id in ipairs(ARGV) do
  local key = KEYS[2] .. id
  local events = {}
  for _, entry in ipairs(redis.call('XRANGE', KEYS[3] .. id, '-', '+')) do events[#events + 1] = entry[2][2] end
  jobs[id] = { redis.call('HMGET', key, 'status', 'attempt', 'stream', 'entry', 'cancel'), events,
    { redis.call('TTL', key), redis.call('TTL', KEYS[3] .. id), redis.call('TTL', KEYS[4] .. id) },
    redis.call('HKEYS', KEYS[4] .. id) }
end
for _, stream in ipairs(redis.call('KEYS', KEYS[5] .. '*')) do
  local entries, pending = {}, {}
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+')) do entries[entry[1]] = entry[2][2] end
  local reply = redis.pcall('XPENDING', stream, KEYS[6], '-', '+', 1000)
  for _, entry in ipairs(reply.err and {} or reply) do pending[entry[1]] = true end
  queues[stream] = { entries, pending }
end
return cjson.encode({ jobs = jobs, queues = queues, waiting = redis.call('ZRANGE', KEYS[1], 0, -1),
  reserved = redis.call('HGETALL', KEYS[7]), reviewed = redis.call('ZRANGE', KEYS[8], 0, -1) })
"""


class Objects:
    """An object store in memory, which may be away."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.away = False

    def _check(self) -> None:
        if self.away:
            raise ResultsUnavailable("the object store is away")

    async def put(self, name: str, data: bytes, media_type: str, max_age: int = 0) -> Reference:
        self._check()
        self.held[f"s3://memory/{name}"] = data
        return Reference(f"s3://memory/{name}")

    async def get(self, reference: Reference) -> bytes:
        self._check()
        if reference not in self.held:
            raise NotFound("it is not in the object store any more")
        return self.held[reference]

    async def delete(self, references: Sequence[Reference]) -> None:
        if references:
            self._check()
        for reference in references:
            self.held.pop(reference, None)


class Rig:
    """One server for all runs, and two connections to its queue: a gateway's and a worker's."""

    def __init__(self, folder: Path) -> None:
        self.server = EmbeddedServer(folder, maxmemory="0")
        self.server.start()
        self.runner = asyncio.Runner()
        self.tally: Counter[str] = Counter()
        """Counts what happened, so that a test can check that it tested something."""
        limits = Settings(
            max_waiting=CAP,
            max_attempts=MAX_ATTEMPTS,
            claim_idle_seconds=IDLE_MS / 1000,
            redis_memory_bytes=MEMORY,
            batch_in_flight=BATCH_IN_FLIGHT,
        )
        self.gateway, self.worker = (JobQueue.connect(self.server.url, limits) for _ in range(2))
        self.objects = Objects()
        self.gateway.objects = cast(Any, self.objects)
        self.client = redis.Redis.from_url(self.server.url)
        self._snapshot = self.client.register_script(SNAPSHOT)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def snapshot(self, jobs: Sequence[str]) -> Any:
        return json.loads(
            self._snapshot([keys.WAITING, *PREFIXES, keys.GROUP, keys.RESERVED, keys.RESERVED_UNTIL], list(jobs))
        )

    def age(self, claim: Claim) -> None:
        """Makes the claim look as if its worker had been silent for too long."""
        entry = [claim.entry_id]
        self.client.xclaim(claim.stream, keys.GROUP, keys.CONSUMER, 0, entry, idle=IDLE_MS + 1, justid=True)

    def age_waiting(self, jobs: Sequence[str]) -> None:
        """Makes these special jobs look as if they had waited for long. Their entries are delivered while they wait."""
        for job in jobs:
            stream, entry = self.client.hmget(keys.job(job), "stream", "entry")
            with contextlib.suppress(redis.ResponseError):  # the group does not exist yet
                self.client.xclaim(stream, keys.GROUP, keys.CONSUMER, 0, [entry], idle=IDLE_MS + 1, justid=True)

    def worker_that(self, able: bool) -> JobQueue:
        """Returns the connection of a worker that can, or cannot, run special jobs."""
        self.worker.capabilities = CAPABILITIES | {"special"} if able else CAPABILITIES
        return self.worker

    def just_looked(self, models: Sequence[str], able: bool) -> None:
        """Makes all workers believe that one like this has just looked for jobs of silent workers."""
        worker, (seconds, _) = self.worker_that(able), self.client.time()
        can = " ".join(sorted(worker._special))
        streams = worker._list_streams(models)
        looked = [f"{name} {can}" if f":{keys.SPECIAL}" in name else name for name in streams]
        self.client.hset(keys.LOOKED, mapping=dict.fromkeys(looked, seconds))

    async def unanswered(self, worker: str, models: Sequence[str], able: bool) -> Claim | None:
        """Makes a claim whose answer the worker does not get. The test gets it."""
        queue, taken = self.worker_that(able), None
        carry_out = queue._run

        async def carried_out(*args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            record, how = await carry_out(*args, **kwargs)
            taken = claim_from(worker, record, how) if record else None
            raise Unavailable("no answer")

        queue._run = carried_out  # type: ignore[method-assign]
        try:
            with contextlib.suppress(Unavailable):
                await queue.claim(worker, models, block_seconds=0)
        finally:
            queue._run = carry_out  # type: ignore[method-assign]
        return taken

    def forget_calls(self) -> None:
        """Makes all workers forget their unanswered calls, and gateways the workers, as after a restart."""
        self.worker._unanswered.clear()
        self.gateway._roster = Roster(self.gateway)

    def kill_server(self) -> None:
        self.server.kill()
        self.server.stop()

    def start_server(self) -> None:
        """Kills the server and starts it again with its log. The clients reconnect."""
        self.server.start()
        self.tally["server kills"] += 1
        for queue in (self.gateway, self.worker):
            self.run(self._reconnected(queue))
        self.client.close()
        self.client.config_set("auto-aof-rewrite-min-size", "4mb")  # so kills hit rewrites

    async def _reconnected(self, queue: JobQueue) -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await queue.ping()
                except Unavailable:
                    await asyncio.sleep(0)  # the next try uses the next connection

    def close(self) -> None:
        self.run(self.gateway.close())
        self.run(self.worker.close())
        self.client.close()
        self.runner.close()
        self.server.stop()

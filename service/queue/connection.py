"""The connection to Redis: two clients, one script, and one error for every way Redis can be unavailable."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from redis.asyncio import Redis
from redis.exceptions import AskError, MovedError, RedisError

from patchforge.service.errors import QueueRefused, Unavailable
from patchforge.service.messages.events import Cancelled, Expired, Failed, Queued
from patchforge.service.messages.room import PREVIEWS_BYTES
from patchforge.service.messages.schemas import Job, JobError
from patchforge.service.queue import keys
from patchforge.service.queue.masters import open_clients
from patchforge.service.queue.reasons import reason_of
from patchforge.service.queue.records import job_from
from patchforge.service.queue.scripts import build_scripts
from patchforge.service.settings import Settings

COMMAND_TIMEOUT = 3.0  # seconds to wait for an answer from Redis
REPLICAS_TIMEOUT = 1.5  # seconds to wait for replicas
LONGEST_BLOCK = 2.0  # longest blocking read, in seconds; the longer, the later a silent server is noticed
EVENTS_KEPT = 512  # most events kept for one job, unless more of them are no previews
DEAD_LETTERS_KEPT = 1000
MAX_OPEN_BATCHES = 100  # of one API key
BATCH_LINE_BYTES = 512  # for each line of a batch: its outcome and custom id, until the batch ends
REVIEW_SECONDS = 60  # between looks whether a reservation's job has ended unnoticed
REVIEWED = 100  # reservations that one call looks at
ADMITTING = frozenset({"submit", "feed_line", "create_batch", "admit_file", "add_file"})  # refused when Redis is full
PROMISED = ADMITTING - {"feed_line", "admit_file"} | {"move_results"}
"""On replicas before the caller hears, who then deletes what it needs no more; others are simply repeated."""
LOOK_SECONDS = 1.0  # between two looks for jobs of silent workers, over all workers
RINGS = 64  # most workers that find a bell rung without having waited at it
BELL_MS = 5000  # how long a bell stays rung
CHANGES_KEPT = 5000  # workers whose last change is known
SKIPS = 1000  # stale entries that one claim may skip in each stream; takes Redis about 10 ms


@dataclass(frozen=True)
class Memory:
    """Memory of the queue server, in bytes; for limits, 0 = none."""

    used: int
    limit: int
    """Its own `maxmemory`."""
    reserved: int
    """What accepted jobs may still come to hold."""
    admission_limit: int
    """What may be used and reserved together when a job is accepted."""


class QueueConnection:
    """One process's connection to the queue server. Any method may raise Unavailable.

    `on_ended` is called with each job that a call from here ended without `finish`: cancelled while no worker ran it,
    expired, or dead-lettered (`error.code` is `dead_letter`). Over all processes, it is called once per job.
    """

    number = 0
    """Which of several queue servers this is: its place in `PATCHFORGE_REDIS_URLS`."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        self._redis = redis
        self._blocking = blocking
        self._scripts = {
            # When Redis is full, new jobs are refused, but accepted jobs may still finish.
            command: redis.register_script(f"#!lua{'' if command in ADMITTING else ' flags=allow-oom'}\n{text}")
            for command, text in build_scripts(_constants(settings)).items()
        }
        self._wait_replicas = settings.redis_wait_replicas
        self._history: str | None = None
        """The `master_replid` that `check_server` has just read, until someone uses it."""
        self._fleet_version: tuple[float, bytes | None] = (-math.inf, None)
        """When the version of the announcements was last asked for, and what it was."""
        self.on_ended: Callable[[Job], None] = lambda job: None
        self.on_no_room: Callable[[], None] = lambda: None
        """Called with each submit, file and batch that is refused for lack of memory."""

    @classmethod
    def connect(cls, url: str, settings: Settings, number: int = 0) -> Self:
        """Returns a queue on the server that a URL names, or its Sentinels. It connects on first use.

        Raises:
            InvalidRequest: a certificate or key in the settings cannot be used.
        """
        queue = cls(*open_clients(url, settings, timeout=COMMAND_TIMEOUT, longest_block=LONGEST_BLOCK), settings)
        queue.number = number
        return queue

    async def close(self) -> None:
        await self._blocking.aclose()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Checks that Redis answers.

        Raises:
            Unavailable: it does not.
        """
        await self._do("PING")

    async def check_server(self) -> None:
        """Checks the server's version and configuration, and expires what is overdue.

        Raises:
            Unavailable: the server is older than Redis 7, which cannot run the queue's script; or it is configured to
                evict keys when it is full, which would lose accepted jobs without a sign.
            QueueRefused: it has another place in other processes' list of servers, so ids would name wrong ones.
        """
        asked_at = time.monotonic()
        sections = "server", "memory", "replication"
        info, (known, fleet), overdue = await self._do_together(
            ("INFO", *sections), ("MGET", keys.SERVER, keys.FLEET), ("ZCOUNT", keys.WAITING, "-inf", int(time.time()))
        )
        self._history, self._fleet_version = str(info["master_replid"]), (asked_at, fleet)
        version, policy = str(info.get("redis_version")), info.get("maxmemory_policy")
        if int(version.partition(".")[0]) < 7:
            raise Unavailable(f"the queue server must be Valkey, or Redis 7 or newer, not Redis {version}")
        if policy != "noeviction":
            raise Unavailable(f"the queue server's maxmemory-policy must be noeviction, not {policy}")
        if known is None:
            with contextlib.suppress(Unavailable):  # this is about reading; who writes learns why that fails
                await self._do("SET", keys.SERVER, self.number, "NX")
        elif int(known) != self.number:
            raise QueueRefused(
                f"the queue server is number {int(known)} of other processes' PATCHFORGE_REDIS_URLS, and number "
                f"{self.number} of ours: all need the same list, and its order must not change"
            )

        if overdue:
            with contextlib.suppress(Unavailable):
                # Without a worker, nobody else may run a script soon; each expires first what is overdue.
                await self._run("backlog")

    async def check_accepts(self) -> None:
        """Checks that the server takes writes, and has the replicas that a job needs to be accepted.

        Raises:
            Unavailable: it does not.
        """
        await self._do("SET", keys.SERVER, self.number)
        if self._wait_replicas and (await self.replication())[0] < self._wait_replicas:
            raise Unavailable(f"fewer than {self._wait_replicas} replicas follow the queue server")

    async def check_not_refused(self) -> None:
        """For start-up: raises QueueRefused if the server answers and will not serve; it may be away."""
        try:
            await self.check_server()
        except QueueRefused:
            raise
        except Unavailable:
            pass

    async def replication(self) -> tuple[int, int]:
        """Returns the number of replicas that follow the queue server, and the bytes that the nearest one lacks."""
        info = await self._do("INFO", "replication")
        replicas = [each for name, each in info.items() if name.startswith("slave") and isinstance(each, dict)]
        offsets = [int(each["offset"]) for each in replicas if each["state"] == "online"]
        own = int(info["master_repl_offset"])
        return len(offsets), own - max(offsets, default=own)

    async def memory(self) -> Memory:
        """Returns how much memory the queue server uses, and may use."""
        return Memory(*await self._run("memory"))

    async def _do(self, *command: str | bytes | int) -> Any:
        client: Any = self._redis  # its execute_command has no types
        with redis_call():
            return await client.execute_command(*command)

    async def _do_together(self, *commands: Sequence[str | bytes | int]) -> list[Any]:
        """Runs several commands that only read, and returns their answers. Each round trip wakes the server once."""
        client: Any = self._redis  # as above
        with redis_call():
            try:
                async with client.pipeline(transaction=False) as pipeline:
                    for command in commands:
                        pipeline.execute_command(*command)
                    answers: list[Any] = await pipeline.execute()
                    return answers
            except (MovedError, AskError):  # followed only for single commands
                return [await self._do(*command) for command in commands]

    async def _run(self, command: str, *args: Any, streams: Sequence[str] = (keys.WAITING,)) -> Any:
        """Runs one command of the scripts, and reports the jobs that ended as a side effect."""
        replicas = missing = self._wait_replicas if command in PROMISED else 0
        script = self._scripts[command]
        with redis_call():
            if replicas:
                async with self._redis.client() as connection:  # WAIT is about what its own connection wrote
                    result, ended = await script(keys=streams, args=[command, *args], client=connection)
                    have = await connection.execute_command("WAIT", replicas, round(1000 * REPLICAS_TIMEOUT))
                    missing = max(0, replicas - have)
            else:
                result, ended = await script(keys=streams, args=[command, *args])
        for record in ended:
            self.on_ended(job_from(record))
        if missing:
            raise Unavailable(f"{missing} of {replicas} replicas have not confirmed this, so a failover may lose it")
        return result


@contextlib.contextmanager
def redis_call() -> Iterator[None]:
    """Turns connection errors, timeouts and what Redis refuses into Unavailable, which says why."""
    try:
        with unlost_cancellation():
            yield
    except (RedisError, OSError) as error:
        if (reason := reason_of(error)) is None:
            raise
        raise reason from error


@contextlib.contextmanager
def unlost_cancellation() -> Iterator[None]:
    """Raises CancelledError if the task was cancelled inside this block and the cancellation was lost.

    redis-py sends through `asyncio.wait_for`. Before Python 3.12, that swallows a cancellation which arrives just as
    the call completes. A reader could then wait for ever.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


def _constants(settings: Settings) -> dict[str, str | int | float]:
    """Returns the key names and limits that the scripts use."""
    error = JobError(
        code="dead_letter",
        message=f"given up after {settings.max_attempts} attempts: each time, its worker stopped responding",
    )
    return {
        **{name: value for name, value in vars(keys).items() if name.isupper()},
        "MAX_WAITING": settings.max_waiting,
        "MAX_ATTEMPTS": settings.max_attempts,
        "MAX_IN_FLIGHT": settings.max_in_flight,
        "RATE_LIMIT": settings.rate_limit,
        "RATE_BURST": settings.rate_burst,
        "CLAIM_IDLE_MS": round(1000 * settings.claim_idle_seconds),
        "RESULT_TTL": settings.result_ttl_seconds,
        "IDEMPOTENCY_TTL": settings.idempotency_ttl_seconds,
        "BATCH_IN_FLIGHT": settings.batch_in_flight,
        "BATCH_TTL": settings.batch_ttl_seconds,
        "MAX_OPEN_BATCHES": MAX_OPEN_BATCHES,
        "DEAD_LETTERS_KEPT": DEAD_LETTERS_KEPT,
        "SKIPS": SKIPS,
        "EVENTS_KEPT": EVENTS_KEPT,
        "PREVIEWS_BYTES": PREVIEWS_BYTES,
        "MEMORY_BYTES": settings.redis_memory_bytes,
        "BATCH_LINE_BYTES": BATCH_LINE_BYTES,
        "REVIEW_SECONDS": REVIEW_SECONDS,
        "REVIEWED": REVIEWED,
        "LOOK_SECONDS": LOOK_SECONDS,
        "RINGS": RINGS,
        "BELL_MS": BELL_MS,
        "CHANGES_KEPT": CHANGES_KEPT,
        "QUEUED": Queued().model_dump_json(),
        "CANCELLED": Cancelled().model_dump_json(),
        "EXPIRED": Expired().model_dump_json(),
        "DEAD_LETTER": Failed(error=error).model_dump_json(),
        "DEAD_LETTER_ERROR": error.model_dump_json(),
    }

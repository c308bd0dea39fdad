"""How the queue talks to Redis: two clients, one script, and one error for every way Redis can be away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, OutOfMemoryError, ReadOnlyError, ResponseError, TimeoutError
from redis.maint_notifications import MaintNotificationsConfig

from service import keys
from service.errors import Unavailable
from service.events import Cancelled, Expired, Failed, Queued
from service.queue_records import job_from
from service.schemas import Job, JobError
from service.settings import Settings

COMMAND_TIMEOUT = 3.0  # seconds until a silent Redis is given up
LONGEST_BLOCK = 5.0  # seconds one blocking read lasts at most
EVENTS_KEPT = 512  # of one job, at most
DEAD_LETTERS_KEPT = 1000
SKIPS = 1000  # dead entries one claim passes over per stream; about 10 ms of Redis's time

# What Redis answers when it cannot serve now: no memory, no disk, a failover under way.
_PASSING_ERRORS = ("OOM ", "MISCONF ", "NOREPLICAS ", "CLUSTERDOWN ", "MASTERDOWN ", "TRYAGAIN ", "UNBLOCKED ")


class QueueConnection:
    """The queue server, seen from one process. Any method may raise Unavailable: Redis is away, or full.

    ``on_ended`` is called with each job that a call from here ended other than by ``finish``: cancelled while no
    worker ran it, expired, or dead-lettered (``error.code`` is ``dead_letter``). Across all processes, once per job.
    """

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        self._redis = redis
        self._blocking = blocking
        script = _script(settings)
        # With Redis full, new work is refused, but what was accepted may still go on to its end.
        self._admit = redis.register_script("#!lua\n" + script)
        self._advance = redis.register_script("#!lua flags=allow-oom\n" + script)
        self.on_ended: Callable[[Job], None] = lambda job: None

    @classmethod
    def connect(cls, url: str, settings: Settings) -> Self:
        """A queue on the server at a ``redis://`` or ``rediss://`` URL; connects when first used."""
        return cls(*_clients(url), settings)

    async def close(self) -> None:
        await self._blocking.aclose()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Raises Unavailable if Redis does not answer."""
        await self._do("PING")

    async def check_server(self) -> None:
        """For start-up. Raises Unavailable if Redis is older than 7, which cannot run the queue's script, or is set to
        evict keys when full, which would drop accepted jobs in silence.
        """
        info = await self._do("INFO")
        version, policy = str(info.get("redis_version")), info.get("maxmemory_policy")
        if int(version.partition(".")[0]) < 7:
            raise Unavailable(f"the queue server must be Redis 7 or Valkey at least, not Redis {version}")
        if policy != "noeviction":
            raise Unavailable(f"the queue server's maxmemory-policy must be noeviction, not {policy}")

    async def memory(self) -> tuple[int, int]:
        """Bytes the queue server uses, and may use; 0 if it has no limit."""
        info = await self._do("INFO", "memory")
        return int(info["used_memory"]), int(info["maxmemory"])

    async def _do(self, *command: str | int) -> Any:
        client: Any = self._redis  # its execute_command has no types
        with redis_call():
            return await client.execute_command(*command)

    async def _run(self, command: str, *args: Any, streams: Sequence[str] = (keys.WAITING,)) -> Any:
        """Calls one command of ``queue.lua`` and reports the jobs it ended by the way."""
        script = self._admit if command == "submit" else self._advance
        with redis_call():
            result, ended = await script(keys=streams, args=[command, *args])
        for record in ended:
            self.on_ended(job_from(record))
        return result


@contextlib.contextmanager
def redis_call() -> Iterator[None]:
    """Turns connection errors, timeouts and Redis's own passing troubles into Unavailable."""
    try:
        with unlost_cancellation():
            yield
    except (ConnectionError, TimeoutError, OSError) as error:
        raise Unavailable("the queue server is away") from error
    except (OutOfMemoryError, ReadOnlyError) as error:
        raise Unavailable("the queue server takes no writes now") from error
    except ResponseError as error:
        if str(error).startswith(_PASSING_ERRORS):
            raise Unavailable("the queue server cannot serve now") from error
        raise


@contextlib.contextmanager
def unlost_cancellation() -> Iterator[None]:
    """Raises CancelledError if the task was cancelled meanwhile and no one heard of it.

    redis-py sends through ``asyncio.wait_for``, which before Python 3.12 swallows a cancellation that comes just as
    the sending is done; a reader could then go on to wait forever.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > before:
        raise asyncio.CancelledError


def _clients(url: str) -> tuple[Redis, Redis]:
    """A client for commands and one for blocking reads, both bounded; they connect when first used.

    Neither retries: a write that timed out may have happened, and only the caller knows whether to repeat it.
    Maintenance notifications are off because with them redis-py does not look whether a pooled connection was closed
    by the server, so that after a restart each would fail once more, at some later time.
    """
    common: dict[str, Any] = {
        "socket_connect_timeout": COMMAND_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    commands: BlockingConnectionPool = BlockingConnectionPool.from_url(
        url, max_connections=32, timeout=COMMAND_TIMEOUT, socket_timeout=COMMAND_TIMEOUT, **common
    )
    blocking: ConnectionPool = ConnectionPool.from_url(
        url, max_connections=8, socket_timeout=LONGEST_BLOCK + COMMAND_TIMEOUT, **common
    )
    return Redis.from_pool(commands), Redis.from_pool(blocking)


def _script(settings: Settings) -> str:
    """The text of ``queue.lua``, headed by one line that defines the key names and limits it uses."""
    error = JobError(
        code="dead_letter",
        message=f"given up after {settings.max_attempts} attempts: each time, the worker running it fell silent",
    )
    constants: dict[str, str | int] = {
        **{name: value for name, value in vars(keys).items() if name.isupper()},
        "MAX_WAITING": settings.max_waiting,
        "MAX_ATTEMPTS": settings.max_attempts,
        "MAX_IN_FLIGHT": settings.max_in_flight,
        "RATE_LIMIT": settings.rate_limit,
        "RATE_BURST": settings.rate_burst,
        "CLAIM_IDLE_MS": round(1000 * settings.claim_idle_seconds),
        "RESULT_TTL": settings.result_ttl_seconds,
        "IDEMPOTENCY_TTL": settings.idempotency_ttl_seconds,
        "DEAD_LETTERS_KEPT": DEAD_LETTERS_KEPT,
        "SKIPS": SKIPS,
        "QUEUED": Queued().model_dump_json(),
        "CANCELLED": Cancelled().model_dump_json(),
        "EXPIRED": Expired().model_dump_json(),
        "DEAD_LETTER": Failed(error=error).model_dump_json(),
        "DEAD_LETTER_ERROR": error.model_dump_json(),
    }
    header = " ".join(f"local {name} = {json.dumps(value)}" for name, value in constants.items())
    return f"{header}\n{files('service').joinpath('queue.lua').read_text('utf-8')}"

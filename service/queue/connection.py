"""The connection to Redis: two clients, one script, and one error for every way Redis can be unavailable."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)
from redis.maint_notifications import MaintNotificationsConfig

from patchforge.service.errors import QueueRefused, Unavailable
from patchforge.service.messages.events import Cancelled, Expired, Failed, Queued
from patchforge.service.messages.schemas import Job, JobError
from patchforge.service.queue import keys
from patchforge.service.queue.records import job_from
from patchforge.service.queue.scripts import build_scripts
from patchforge.service.settings import Settings

COMMAND_TIMEOUT = 3.0  # seconds to wait for an answer from Redis
LONGEST_BLOCK = 5.0  # longest blocking read, in seconds
EVENTS_KEPT = 512  # most events kept for one job
DEAD_LETTERS_KEPT = 1000
LOOK_SECONDS = 1.0  # between two looks for jobs of silent workers, over all workers
RINGS = 64  # most workers that find a bell rung without having waited at it
BELL_MS = 5000  # how long a bell stays rung
CHANGES_KEPT = 5000  # workers whose last change is known
SKIPS = 1000  # stale entries that one claim may skip in each stream; takes Redis about 10 ms

# What Redis answers while it cannot serve: no memory, no disk, a failover in progress.
_PASSING_ERRORS = ("OOM ", "MISCONF ", "NOREPLICAS ", "CLUSTERDOWN ", "MASTERDOWN ", "TRYAGAIN ", "UNBLOCKED ")


class QueueConnection:
    """One process's connection to the queue server. Any method may raise Unavailable.

    `on_ended` is called with each job that a call from here ended without `finish`: cancelled while no worker ran it,
    expired, or dead-lettered (`error.code` is `dead_letter`). Over all processes, it is called once per job.
    """

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        self._redis = redis
        self._blocking = blocking
        self._scripts = {
            # When Redis is full, new jobs are refused, but accepted jobs may still finish.
            command: redis.register_script(f"#!lua{'' if command == 'submit' else ' flags=allow-oom'}\n{text}")
            for command, text in build_scripts(_constants(settings)).items()
        }
        self.on_ended: Callable[[Job], None] = lambda job: None

    @classmethod
    def connect(cls, url: str, settings: Settings) -> Self:
        """Returns a queue on the server at a `redis://` or `rediss://` URL. It connects on first use."""
        return cls(*_clients(url), settings)

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
        """Checks the server's version and configuration.

        Raises:
            Unavailable: the server is older than Redis 7, which cannot run the queue's script; or it is configured to
                evict keys when it is full, which would lose accepted jobs without a sign.
        """
        info = await self._do("INFO", "server", "memory")
        version, policy = str(info.get("redis_version")), info.get("maxmemory_policy")
        if int(version.partition(".")[0]) < 7:
            raise Unavailable(f"the queue server must be Valkey, or Redis 7 or newer, not Redis {version}")
        if policy != "noeviction":
            raise Unavailable(f"the queue server's maxmemory-policy must be noeviction, not {policy}")

    async def check_not_refused(self) -> None:
        """For start-up: raises QueueRefused if the server answers and will not serve; it may be away."""
        try:
            await self.check_server()
        except QueueRefused:
            raise
        except Unavailable:
            pass

    async def memory(self) -> tuple[int, int]:
        """Returns the bytes that the queue server uses, and the bytes it may use; 0 = no limit."""
        info = await self._do("INFO", "memory")
        return int(info["used_memory"]), int(info["maxmemory"])

    async def _do(self, *command: str | int) -> Any:
        client: Any = self._redis  # its execute_command has no types
        with redis_call():
            return await client.execute_command(*command)

    async def _run(self, command: str, *args: Any, streams: Sequence[str] = (keys.WAITING,)) -> Any:
        """Runs one command of `queue.lua`, and reports the jobs that ended as a side effect."""
        with redis_call():
            result, ended = await self._scripts[command](keys=streams, args=[command, *args])
        for record in ended:
            self.on_ended(job_from(record))
        return result


@contextlib.contextmanager
def redis_call() -> Iterator[None]:
    """Turns connection errors, timeouts and temporary Redis errors into Unavailable."""
    try:
        with unlost_cancellation():
            yield
    except AuthenticationError as error:
        raise QueueRefused("the queue server refuses the user or password in REDIS_URL") from error
    except InvalidResponse as error:
        raise QueueRefused("what answers at REDIS_URL is no Redis server, or expects TLS: rediss://") from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise Unavailable("the queue server cannot be reached") from error
    except (OutOfMemoryError, ReadOnlyError) as error:
        raise Unavailable("the queue server accepts no writes at the moment") from error
    except ResponseError as error:
        if str(error).startswith(_PASSING_ERRORS):
            raise Unavailable("the queue server cannot serve requests at the moment") from error
        if (reason := _explain_refusal(error)) is not None:
            raise QueueRefused(reason) from error
        raise


def _explain_refusal(error: ResponseError) -> str | None:
    """What to do about an answer that stays the same until someone changes a setting; None for any other error."""
    text = str(error)
    named = re.search(r"'([\w|]+)'", text)
    command = named[1].upper() if named else ""
    if isinstance(error, NoPermissionError) or "ACL failure in script" in text or "executing the script can't" in text:
        what = f"run {command}" if command else "use keys and channels that begin with {patchforge}"
        return f"the queue server's user may not {what}: allow it with ACL SETUSER"
    if "unknown command" in text:
        return f"the queue server has no command {command}: it must be Redis 7 or Valkey, with its usual commands"
    if "DB index is out of range" in text:
        return "the queue server has no database with the number in REDIS_URL"
    if isinstance(error, MovedError):
        return "the queue server is a cluster that keeps the queue on another node: name that one in REDIS_URL"
    return None


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


def _clients(url: str) -> tuple[Redis, Redis]:
    """Returns a client for commands and one for blocking reads, both with time limits. They connect on first use.

    Neither of them retries: a write that timed out may have happened, and only the caller knows whether to repeat it.
    Maintenance notifications are off. With them, redis-py does not check whether the server closed a pooled
    connection, so each connection would fail once more after a restart.
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


def _constants(settings: Settings) -> dict[str, str | int | float]:
    """Returns the key names and limits that `queue.lua` uses."""
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
        "DEAD_LETTERS_KEPT": DEAD_LETTERS_KEPT,
        "SKIPS": SKIPS,
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

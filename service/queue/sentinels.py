"""Where the queue's master is: at the address in `REDIS_URL`, at a cluster's other node, or where Sentinels say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

import structlog
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.exceptions import AuthenticationError, ConnectionError, RedisError

LOOK_SECONDS = 1.0  # time for which an answer of the Sentinels counts

Address = tuple[str, int]

log = structlog.get_logger()


class UnknownMaster(ConnectionError):
    """The Sentinels answer, and none of them knows a master of this name."""


class NoSentinel(ConnectionError):
    """No Sentinel can be reached."""


class SentinelsRefuse(ConnectionError):
    """Each Sentinel that answers refuses our password."""


class Locator(Protocol):
    """Knows the master's address."""

    watched: bool
    """Whether the master may change without a word to its clients."""

    async def discover_master(self, service_name: str) -> Address:
        """Returns host and port."""

    def follow(self, address: Address) -> None:
        """A cluster's node says that the queue is there."""

    def forget(self) -> None:
        """Nothing useful answered at the address that was given."""

    async def aclose(self) -> None:
        """Closes connections to those who know."""


class FixedAddress:
    """The address in `REDIS_URL`, until a cluster's node names another one, and again when that one is gone."""

    watched = False

    def __init__(self, address: Address) -> None:
        self._home = address
        self._moved: Address | None = None

    async def discover_master(self, service_name: str) -> Address:
        return self._moved or self._home

    def follow(self, address: Address) -> None:
        if address != self._moved:
            log.info("the cluster has the queue on another node", host=address[0], port=address[1])
        self._moved = address

    def forget(self) -> None:
        self._moved = None

    async def aclose(self) -> None:
        pass


class Sentinels(Sentinel):
    """Asks all Sentinels at once, and believes the newest answer.

    One that is cut off with an old master still calls it a master. The others have given the new one a higher
    configuration epoch.
    """

    watched = True

    def __init__(self, addresses: Sequence[Address], **options: Any) -> None:
        """`options` are for connections to Sentinels."""
        super().__init__(addresses, sentinel_kwargs=options)
        self._asking = asyncio.Lock()
        self._found: Address | None = None
        self._last: Address | None = None
        self._asked = 0.0

    async def discover_master(self, service_name: str) -> Address:
        """Returns the master's address; one answer counts for `LOOK_SECONDS`.

        Raises:
            NoSentinel: none answers.
            SentinelsRefuse: none accepts our password.
            UnknownMaster: none knows this name.
            MasterNotFoundError: the master is down, and there is no other one yet.
        """
        async with self._asking:
            if self._found is None or time.monotonic() - self._asked > LOOK_SECONDS:
                self._found = None
                self._found = await self._ask(service_name)
                self._asked = time.monotonic()
                if self._last not in (None, self._found):
                    log.warning("another queue server is the master", host=self._found[0], port=self._found[1])
                self._last = self._found
            return self._found

    def follow(self, address: Address) -> None:
        """Sentinels do not watch clusters, so there is nothing to follow."""

    def forget(self) -> None:
        self._found = None

    async def _ask(self, service_name: str) -> Address:
        asked = (sentinel.sentinel_masters() for sentinel in self.sentinels)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, (RedisError, OSError)):
                raise answer
        replies: list[dict[str, Any]] = [answer for answer in answers if isinstance(answer, dict)]
        if not replies:
            raise _why_silent([answer for answer in answers if isinstance(answer, BaseException)])
        known = [masters[service_name] for masters in replies if service_name in masters]
        if not known:
            raise UnknownMaster(f"no Sentinel knows {service_name}")
        alive = [state for state in known if self.check_master_state(state, service_name)]
        if not alive:
            raise MasterNotFoundError(f"{service_name} is down")
        newest = max(alive, key=lambda state: int(state["config-epoch"]))
        return newest["ip"], newest["port"]


def _why_silent(errors: Sequence[BaseException]) -> ConnectionError:
    """Returns an error that has the most telling of these as its cause."""
    refused = next((error for error in errors if isinstance(error, AuthenticationError)), None)
    why = SentinelsRefuse("refused") if refused else NoSentinel("no answer")
    why.__cause__ = refused or errors[0]
    return why

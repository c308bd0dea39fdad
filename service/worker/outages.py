"""What a worker knows of its queue server: whether it can be used, and since when."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import structlog

from service.errors import Unavailable

RETRY_SECONDS = 0.5

log = structlog.get_logger()
P = ParamSpec("P")
T = TypeVar("T")


class Outages:
    """Told of every call's fate; one log line when an outage begins and one when it is over."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why the server cannot be used; None if it can."""
        self._last = -math.inf

    @property
    def seconds_since(self) -> float:
        """Since the last failed call, by the monotonic clock."""
        return time.monotonic() - self._last

    def failed(self, error: Unavailable) -> None:
        self._last = time.monotonic()
        if error.message != self.reason:
            self.reason = error.message
            log.warning("queue server cannot be used", reason=self.reason)

    def answered(self) -> None:
        if self.reason is not None:
            self.reason = None
            log.info("queue server can be used again")

    async def attempt(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The result of one call; None if the server cannot be used."""
        try:
            result = await call(*args, **kwargs)
        except Unavailable as error:
            self.failed(error)
            return None
        self.answered()
        return result

    async def outlast(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call that may be repeated, as often as it takes."""
        while True:
            try:
                result = await call(*args, **kwargs)
            except Unavailable as error:
                self.failed(error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.answered()
                return result

"""Tracks whether the queue server is reachable."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import structlog

from patchforge.service.errors import ResultsUnavailable, Unavailable

RETRY_SECONDS = 0.5

log = structlog.get_logger()
P = ParamSpec("P")
T = TypeVar("T")


class Outages:
    """Records the result of every call. Logs one line when an outage begins and one when it ends.

    `ResultsUnavailable` passes through: the queue server may be well while the object store is away.
    """

    def __init__(self, server: int | None = None) -> None:
        """`server`: its number, if there are several."""
        self._log = log if server is None else log.bind(server=server)
        self.reason: str | None = None
        """Why the server cannot be used; None if it can."""
        self._last = -math.inf

    @property
    def seconds_since(self) -> float:
        """Seconds since the last failed call."""
        return time.monotonic() - self._last

    def failed(self, error: Unavailable) -> None:
        self._last = time.monotonic()
        if error.message != self.reason:
            self.reason = error.message
            self._log.warning("queue server cannot be used", reason=self.reason)

    def answered(self) -> None:
        if self.reason is not None:
            self.reason = None
            self._log.info("queue server can be used again")

    async def attempt(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Makes one call and returns its result, or None if the server cannot be used."""
        try:
            result = await call(*args, **kwargs)
        except ResultsUnavailable:
            raise
        except Unavailable as error:
            self.failed(error)
            return None
        self.answered()
        return result

    async def outlast(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Repeats a call until the server answers, and returns its result. The call must be safe to repeat."""
        while True:
            try:
                result = await call(*args, **kwargs)
            except ResultsUnavailable:
                raise
            except Unavailable as error:
                self.failed(error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.answered()
                return result

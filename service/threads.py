"""Work in a thread, awaited; the one way from asyncio to threads here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call(…)`` in a thread of the loop's own; whatever it raises is raised here.

    Raises:
        RuntimeError: for a StopIteration, which no future takes (it would end a coroutine's ``await`` as if all were
            well): with `asyncio.to_thread` alone the caller waits for ever.
    """

    def guarded() -> T:
        try:
            return call(*args, **kwargs)
        except StopIteration as error:
            raise RuntimeError(f"{getattr(call, '__qualname__', call)} raised StopIteration") from error

    return await asyncio.to_thread(guarded)

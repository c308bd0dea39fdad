"""Awaits work in a thread; all asyncio code here uses this."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `call(…)` in a thread of the event loop; its errors are raised here.

    Raises:
        RuntimeError: `call` raised StopIteration. A future cannot hold that error, so with `asyncio.to_thread`
            alone the caller would wait for ever.
    """

    def guarded() -> T:
        try:
            return call(*args, **kwargs)
        except StopIteration as error:
            raise RuntimeError(f"{getattr(call, '__qualname__', call)} raised StopIteration") from error

    return await asyncio.to_thread(guarded)

"""Work for held jobs beside the engine: pictures on their way to a distant store, or from there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import ParamSpec, TypeVar

from patchforge.service.errors import ResultsElsewhere, ResultsUnavailable
from patchforge.service.worker.outages import RETRY_SECONDS

P = ParamSpec("P")
T = TypeVar("T")


class Transfers:
    """Tasks by job. At most `PATCHFORGE_MAX_RUNNING` jobs have any: a job holds its claim until they are done."""

    def __init__(self) -> None:
        self.group: asyncio.TaskGroup | None = None
        """Where they run. If one raises an error, the worker ends: it would lose pictures."""
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    @property
    def busy(self) -> bool:
        """Whether there is any work."""
        return bool(self._tasks)

    def begin(self, job_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start `work` for a job."""
        assert self.group is not None
        task = self.group.create_task(work)
        self._tasks.setdefault(job_id, []).append(task)
        task.add_done_callback(lambda done: self._forget(job_id, done))
        return task

    def follow(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start `work` for a job when all its earlier work is done."""
        earlier = list(self._tasks.get(job_id, ()))

        async def in_turn() -> None:
            await asyncio.gather(*earlier)
            await work()

        self.begin(job_id, in_turn())

    def drop(self, job_id: str) -> None:
        """Cancel what is left to do for a job, apart from the task that calls this."""
        for task in self._tasks.pop(job_id, ()):
            if task is not asyncio.current_task():
                task.cancel()

    def _forget(self, job_id: str, done: asyncio.Task[None]) -> None:
        tasks = self._tasks.get(job_id, [])
        if done in tasks:
            tasks.remove(done)
            if not tasks:
                del self._tasks[job_id]


async def outlast_store(call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Repeat a call until the object store can be used. The store itself logs why it cannot.

    Raises:
        ResultsElsewhere: what is wanted is in another store.
    """
    while True:
        try:
            return await call(*args, **kwargs)
        except ResultsElsewhere:
            raise
        except ResultsUnavailable:
            await asyncio.sleep(RETRY_SECONDS)

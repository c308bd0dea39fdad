"""What a worker puts into the object store, beside the engine: finished pictures, and previews over a size.

A store is slower than the queue server, and no two uploads take equally long. What clients learn of a picture still
comes in the order in which it happened: each message waits until the earlier ones of its picture are told.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from patchforge.service.errors import ResultsUnavailable
from patchforge.service.messages.events import Preview
from patchforge.service.messages.small_copies import SMALL_COPY_BYTES
from patchforge.service.queue import Claim, JobQueue
from patchforge.service.threads import in_thread
from patchforge.service.worker.outbox import Message
from patchforge.service.worker.outcomes import PictureMade
from patchforge.service.worker.pictures import shrink_preview
from patchforge.service.worker.transfers import Transfers, outlast_store

MOST_WAITING = 4
"""Messages of one picture that may be under way. While there are as many, previews are left out."""


class Uploads:
    """The uploads of all jobs."""

    def __init__(
        self,
        queue: JobQueue,
        transfers: Transfers,
        tell: Callable[[Message], Awaitable[None]],
        discard: Callable[[Message], None],
        preview_bytes: int,
    ) -> None:
        """`queue`: any one, as all use one store. `preview_bytes`: larger previews go into the store.

        `discard` deletes what a message has in the store, if nobody is told of it.
        """
        self._queue = queue
        self._transfers = transfers
        self._tell = tell
        self._discard = discard
        self._preview_bytes = preview_bytes
        self._under_way: dict[tuple[str, int], list[asyncio.Task[None]]] = {}
        """(job, index of its picture) → what is not told yet, in order."""

    def take_picture(self, claim: Claim, made: PictureMade) -> None:
        """Store a picture, however long that takes, then tell the queue where it is."""
        self._begin(made.job_id, made.index, lambda: self._store_picture(claim, made))

    def take_event(self, claim: Claim, index: int, message: Message) -> bool:
        """Take an event of a picture, if it is a large preview, or has to wait for one. Otherwise returns False."""
        earlier = len(self._under_way.get((message.job_id, index), ()))
        preview = message.content if isinstance(message.content, Preview) else None
        large = preview is not None and len(preview.b64_png) * 3 // 4 > self._preview_bytes
        if not earlier and not large:
            return False
        if preview is None:
            self._begin(message.job_id, index, lambda: _ready(message))
        elif earlier < MOST_WAITING:
            store = self._store_preview
            self._begin(message.job_id, index, lambda: store(claim, preview, message) if large else _ready(message))
        return True

    def _begin(self, job_id: str, index: int, work: Callable[[], Awaitable[Message]]) -> None:
        key = job_id, index
        under_way = self._under_way.setdefault(key, [])
        task = self._transfers.begin(job_id, self._tell_in_turn(work, under_way[-1] if under_way else None))
        under_way.append(task)
        task.add_done_callback(lambda done: self._forget(key, done))

    async def _tell_in_turn(self, work: Callable[[], Awaitable[Message]], earlier: asyncio.Task[None] | None) -> None:
        message = await work()
        try:
            if earlier is not None:
                await asyncio.wait([earlier])
        except asyncio.CancelledError:  # the job is dropped
            self._discard(message)
            raise
        await self._tell(message)

    def _forget(self, key: tuple[str, int], done: asyncio.Task[None]) -> None:
        self._under_way[key].remove(done)
        if not self._under_way[key]:
            del self._under_way[key]

    async def _store_picture(self, claim: Claim, made: PictureMade) -> Message:
        picture = await outlast_store(self._queue.put_picture, claim, made.index, made.data)
        return Message(made.job_id, (made.index, picture))

    async def _store_preview(self, claim: Claim, preview: Preview, message: Message) -> Message:
        """If the store is away, only the small copy is shown."""
        small = await in_thread(shrink_preview, b64decode(preview.b64_png), SMALL_COPY_BYTES)
        with suppress(ResultsUnavailable):
            event, reference = await self._queue.put_preview(claim, preview, small)
            return replace(message, content=event, apart=reference)
        return replace(message, content=preview.model_copy(update={"b64_png": b64encode(small).decode()}))


async def _ready(message: Message) -> Message:
    return message

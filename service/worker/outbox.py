"""What a worker has to tell the queue: sent in order, in the background, and several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from patchforge.service.messages.events import Cancelled, Completed, Failed, PatchesFinished, Preview, Started
from patchforge.service.queue.claims import Claim, Delivery, finished, published, stored
from patchforge.service.results import Reference

TOGETHER_SECONDS = 0.1
"""How long news may wait for more, so that one call carries both. What clients wait for never waits."""
PATIENCE_SECONDS = 1.0
"""How long news that nobody is known to wait for may wait for more. Somebody may have begun to watch meanwhile."""
TOGETHER_BYTES = 1 << 20
MOST_WAITING = 64
"""If there are more, the engine waits: an outage, or a slow connection, must not use up memory."""


@dataclass(frozen=True)
class Message:
    """One message about a job that this worker holds."""

    job_id: str
    content: Started | Preview | PatchesFinished | tuple[int, bytes | Reference] | Completed | Failed | Cancelled
    """An event, or the index of a finished picture and its data or where it is."""

    patient: bool = False
    """Whether it can wait for another message, at most PATIENCE_SECONDS, because nobody was looking on."""

    apart: Reference | None = None
    """Where the preview is of which this has only a small copy."""

    @property
    def stored(self) -> Reference | None:
        """What it has in the object store: nobody needs that if the queue does not take the message."""
        if isinstance(self.content, tuple) and not isinstance(self.content[1], bytes):
            return self.content[1]
        return self.apart

    @property
    def ends_job(self) -> bool:
        return isinstance(self.content, Completed | Failed | Cancelled)

    @property
    def may_be_lost(self) -> bool:
        """Clients may miss it during an outage: the report at the end has everything."""
        return isinstance(self.content, Preview | PatchesFinished)

    @property
    def size(self) -> int:
        """Bytes, approximately."""
        if isinstance(self.content, tuple):
            return len(self.content[1])
        return len(self.content.b64_png) if isinstance(self.content, Preview) else 1000

    def delivery(self, claim: Claim) -> Delivery:
        if isinstance(self.content, tuple):
            return stored(claim, *self.content)
        if isinstance(self.content, Completed | Failed | Cancelled):
            return finished(claim, self.content)
        return published(claim, self.content)


class Outbox:
    """Messages that wait to be sent. `run` hands them to `send`, in order, as many at once as there are."""

    def __init__(self, send: Callable[[Sequence[Message]], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: list[Message] = []
        self._changed = asyncio.Condition()
        self._sent = -TOGETHER_SECONDS
        self._ending: set[str] = set()
        self.unlimited = False
        """Set while the server is away, if there are others whose jobs must go on: the engine then never waits.

        No job is claimed from that server meanwhile, and previews are left out, so there is an end to what waits.
        """

    def ends(self, job_id: str) -> bool:
        """Tells whether the job's last message waits or is being sent: how the job ends is decided."""
        return job_id in self._ending

    async def put(self, message: Message) -> None:
        """Adds a message. Waits while there are too many."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) < MOST_WAITING or self.unlimited)
            if message.ends_job:
                self._ending.add(message.job_id)
            self._waiting.append(message)
            self._changed.notify_all()

    async def lift_limit(self) -> None:
        """Sets `unlimited`, and lets whoever waits go on."""
        async with self._changed:
            self.unlimited = True
            self._changed.notify_all()

    async def run(self) -> None:
        """Sends until it is cancelled."""
        while True:
            messages = await self._take()
            await self._send(messages)
            if any(each.may_be_lost for each in messages):
                self._sent = time.monotonic()
            self._ending -= {each.job_id for each in messages if each.ends_job}

    async def _take(self) -> list[Message]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting)
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._changed.wait_for(self._is_due)
            left = self._sent + TOGETHER_SECONDS - time.monotonic()
            if left > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait_for(self._is_urgent)
            taken = [self._waiting.pop(0)]
            size = taken[0].size
            while self._waiting and size + self._waiting[0].size <= TOGETHER_BYTES:
                taken.append(self._waiting.pop(0))
                size += taken[-1].size
            self._changed.notify_all()
            return taken

    def _is_due(self) -> bool:
        return len(self._waiting) >= MOST_WAITING or not all(each.patient for each in self._waiting)

    def _is_urgent(self) -> bool:
        return len(self._waiting) >= MOST_WAITING or not all(each.may_be_lost for each in self._waiting)

"""Pictures to edit of batch lines that the queue has no room for yet.

A line may be offered many times before there is room. With an object store, its picture goes there once, before the
first offer, and not at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from patchforge.service.messages.source import Source
from patchforge.service.queue.ids import new_id
from patchforge.service.queue.pictures import PictureStore
from patchforge.service.settings import Settings

MOST_OFFERS = 256  # that are remembered; more batches with pictures to edit than that rarely wait at once


@dataclass(frozen=True)
class Offer:
    """A batch's line as it is offered to the queue: the job that it is to become, and where the picture to edit is."""

    line: int
    job_id: str
    fields: Sequence[str | bytes]
    """Names and values in turn, as `PictureStore._keep_source` returns them."""


class Offers(PictureStore):
    """Remembers what lies in the object store for lines that wait. If this process dies, that expires there."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        super().__init__(redis, blocking, settings)
        self._offers: dict[str, Offer] = {}
        """By key of the batch, the oldest first."""

    async def _make_offer(self, batch: str, line: int, source: Source | None) -> Offer:
        """Returns the line's earlier offer that was put off, or a new one."""
        if (earlier := self._offers.get(batch)) is not None and earlier.line == line:
            return self._offers.pop(batch)
        await self._withdraw(batch)
        job_id = new_id(self.number)
        return Offer(line, job_id, await self._keep_source(job_id, source))

    async def _put_off(self, batch: str, offer: Offer) -> None:
        """Remembers an offer that had no room: the line will be offered again."""
        if self.objects is None or not offer.fields:
            return
        self._offers[batch] = offer
        if len(self._offers) > MOST_OFFERS:
            await self._withdraw(next(iter(self._offers)))

    async def _withdraw(self, *batches: str) -> None:
        """Deletes what lies in the store for these batches' lines: they will not be offered again."""
        offers = [self._offers.pop(batch) for batch in batches if batch in self._offers]
        await self._discard_source([field for offer in offers for field in offer.fields])

"""The models that workers served a while ago: an autoscaler may have stopped all of them, and starts one for a job."""

from __future__ import annotations

import time
from collections.abc import Hashable

from patchforge.service.gateway.fleet import Fleet
from patchforge.service.queue import GatewayQueue
from patchforge.service.queue.records import Served

MOST_SECONDS = 60.0
"""Between two writes of the same. A queue server that lost everything knows the models again after so long."""


class RememberedModels:
    """Keeps the cards of the models that are served on the queue server, for a while."""

    def __init__(self, queue: GatewayQueue, seconds: int) -> None:
        """`seconds` is for how long; 0 = never."""
        self._queue = queue
        self._seconds = seconds
        self._noted: Hashable = None
        self._next = 0.0

    async def read(self) -> list[Served]:
        """Returns what is remembered, including what is served now."""
        return await self._queue.remembered() if self._seconds else []

    async def note(self, fleet: Fleet) -> None:
        """Writes down what is served now, if it has changed or was written a while ago."""
        live = [fleet.served_by(card) for card in fleet.cards if card.name not in fleet.asleep]
        facts = frozenset((card.name, card.digest, each.capabilities) for each in live for card in each.cards)
        if not self._seconds or (facts == self._noted and time.monotonic() < self._next):
            return
        await self._queue.remember(live, self._seconds)
        self._noted, self._next = facts, time.monotonic() + min(MOST_SECONDS, self._seconds / 4)

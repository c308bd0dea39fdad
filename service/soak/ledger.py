"""What the clients of a soak saw, and the promises that were broken."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

TERMINAL = ("completed", "failed", "cancelled", "expired")


@dataclass
class Ledger:
    """Shared by all clients."""

    accepted: set[str] = field(default_factory=set)
    """Ids of the jobs that were accepted."""
    answers: Counter[str] = field(default_factory=Counter)
    """Number of answers of every kind."""
    broken: list[str] = field(default_factory=list)
    """Descriptions of broken promises."""


class Watch:
    """The events that one client saw of one job, over any number of connections."""

    def __init__(self, job_id: str, ledger: Ledger) -> None:
        self.job_id = job_id
        self.last_id = ""
        self.terminal: str | None = None
        self._position = (0, 0)
        self._ledger = ledger

    def see(self, event_id: str, kind: str) -> None:
        """Check an event: events come once, in order, and none comes after the terminal event."""
        milliseconds, _, number = event_id.partition("-")
        position = int(milliseconds), int(number)
        if position <= self._position:
            self._ledger.broken.append(f"{self.job_id}: event {event_id} came after {self.last_id}")
        if self.terminal is not None:
            self._ledger.broken.append(f"{self.job_id}: {kind} after {self.terminal}")
        self._position, self.last_id = position, event_id
        if kind in TERMINAL:
            self.terminal = kind

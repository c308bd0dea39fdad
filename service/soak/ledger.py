"""What the clients of a soak were told, and whatever they should not have been."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

TERMINAL = ("completed", "failed", "cancelled", "expired")


@dataclass
class Ledger:
    """One for all clients."""

    accepted: set[str] = field(default_factory=set)
    """Jobs whose ids a client was told."""
    answers: Counter[str] = field(default_factory=Counter)
    """How many of each kind."""
    broken: list[str] = field(default_factory=list)
    """Promises not kept, in words."""

    def accept(self, job_id: str) -> None:
        self.accepted.add(job_id)

    def note(self, answer: str) -> None:
        self.answers[answer] += 1

    def blame(self, what: str) -> None:
        self.broken.append(what)


class Watch:
    """What one client saw of one job, over however many connections."""

    def __init__(self, job_id: str, ledger: Ledger) -> None:
        self.job_id = job_id
        self.last_id = ""
        self.terminal: str | None = None
        self._place = (0, 0)
        self._ledger = ledger

    def see(self, event_id: str, kind: str) -> None:
        """Events come once, in order, and none after the terminal one."""
        milliseconds, _, number = event_id.partition("-")
        place = int(milliseconds), int(number)
        if place <= self._place:
            self._ledger.blame(f"{self.job_id}: event {event_id} came after {self.last_id}")
        if self.terminal is not None:
            self._ledger.blame(f"{self.job_id}: {kind} after {self.terminal}")
        self._place, self.last_id = place, event_id
        if kind in TERMINAL:
            self.terminal = kind

"""What this gateway's inference calls came to, for the statistics that Triton's clients ask for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Duration:
    """Calls, and the time they took together."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += max(0, round(seconds * 1e9))


@dataclass
class Counts:
    """One model's calls since this gateway started."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    """How long successful calls waited for a worker."""
    infer: Duration = field(default_factory=Duration)
    """How long they were drawn."""
    pictures: int = 0
    last_ms: int = 0
    """Unix milliseconds of the latest successful call; 0 before the first."""

    def succeeded(self, pictures: int, seconds: float, queued: float) -> None:
        self.success.add(seconds)
        self.queue.add(queued)
        self.infer.add(seconds - queued)
        self.pictures += pictures
        self.last_ms = round(time.time() * 1000)


class InferenceStatistics:
    """Counts by model."""

    def __init__(self) -> None:
        self._models: dict[str, Counts] = {}

    def of(self, model: str) -> Counts:
        """The counts of a model that a worker has announced: the names of callers would grow without end."""
        return self._models.setdefault(model, Counts())

"""When previews are made: at an interval for each picture, and all together within a share of the engine's time."""

from __future__ import annotations

from collections.abc import Sequence

SAVED_SECONDS = 0.1
"""Unused time that may be saved up, so that after a quiet while several first previews can be made at once."""


class PreviewPace:
    """Decoding a small picture costs about as much as evaluating it: unbounded, previews would slow all jobs down."""

    def __init__(self, interval: float, share: float) -> None:
        """``interval``: least seconds between previews of one picture; ``share``: of time, what previews may take."""
        self.interval = interval
        self.share = share
        self._room = SAVED_SECONDS
        self._each = 0.0

    def due(self, previewed: Sequence[float | None], now: float) -> list[int]:
        """Which pictures to show now, given when each was last shown: never shown ones first, then longest ago."""
        waiting = [index for index, last in enumerate(previewed) if last is None or now - last >= self.interval]
        waiting.sort(key=lambda index: previewed[index] or 0.0)
        if self._room <= 0:
            return []
        fitting = max(1, int(self._room / self._each)) if self._each > 0 else len(waiting)
        return sorted(waiting[:fitting])

    def worked(self, seconds: float) -> None:
        """The engine did other things than previews for so long."""
        self._room = min(SAVED_SECONDS, self._room + self.share * seconds)

    def showed(self, count: int, seconds: float) -> None:
        """So many previews took so long."""
        if count:
            self._each = seconds / count
            self._room -= seconds

"""Limits previews: a minimum interval for each picture, and a maximum share of the engine's time for all."""

from __future__ import annotations

from collections.abc import Sequence

SAVED_SECONDS = 0.1
"""Unused time that may be saved up. After a quiet time, several first previews can then be decoded together."""


class PreviewPace:
    """Decides which previews to make. Each costs about as much as an evaluation; without limits, jobs would be slow."""

    def __init__(self, interval: float, share: float) -> None:
        """`interval`: minimum seconds between previews of one picture. `share`: maximum share of time for previews."""
        self.interval = interval
        self.share = share
        self._room = SAVED_SECONDS
        self._each = 0.0

    def due(self, previewed: Sequence[float | None], now: float) -> list[int]:
        """Return the pictures to preview now. `previewed` says when each was last shown; those never shown go first."""
        waiting = [index for index, last in enumerate(previewed) if last is None or now - last >= self.interval]
        waiting.sort(key=lambda index: previewed[index] or 0.0)
        if self._room <= 0:
            return []
        fitting = max(1, int(self._room / self._each)) if self._each > 0 else len(waiting)
        return sorted(waiting[:fitting])

    def worked(self, seconds: float) -> None:
        """Record that the engine spent `seconds` on other work than previews."""
        self._room = min(SAVED_SECONDS, self._room + self.share * seconds)

    def showed(self, count: int, seconds: float) -> None:
        """Record how long `count` previews took."""
        if count:
            self._each = seconds / count
            self._room -= seconds

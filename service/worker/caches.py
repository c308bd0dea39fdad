"""How many bytes of keys and values the pictures in flight may keep; counts, touches no tensor."""

from __future__ import annotations

from collections.abc import Hashable


class CacheBudget:
    """Room is granted to a picture for all it will keep, so that one that has begun can always go on."""

    def __init__(self, limit: int) -> None:
        """``limit`` in bytes; a picture that needs more than that is still granted it when it is the only one."""
        self.limit = limit
        self._granted: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        """Bytes granted."""
        return sum(self._granted.values())

    def holds(self, key: Hashable) -> bool:
        """Whether ``key`` was granted its room."""
        return key in self._granted

    def grant(self, key: Hashable, size: int) -> bool:
        """Whether ``key`` may keep ``size`` bytes now, or already does."""
        if self.holds(key):
            return True
        used = self.used
        if used and used + size > self.limit:
            return False
        self._granted[key] = size
        return True

    def release(self, key: Hashable) -> None:
        """Harmless for one that was granted nothing."""
        self._granted.pop(key, None)

"""Limits the bytes of keys and values that running pictures keep. Only counts, touches no tensor."""

from __future__ import annotations

from collections.abc import Hashable


class CacheBudget:
    """Grants a picture room for everything it will keep, so a picture that has started can always continue."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes. A picture that needs more is admitted when it is the only one."""
        self.limit = limit
        self._granted: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        """Bytes granted now."""
        return sum(self._granted.values())

    def holds(self, key: Hashable) -> bool:
        """Tells whether `key` has been granted its room."""
        return key in self._granted

    def grant(self, key: Hashable, size: int) -> bool:
        """Grants `key` room for `size` bytes, if it has none yet. Returns False if there is not enough."""
        if self.holds(key):
            return True
        used = self.used
        if used and used + size > self.limit:
            return False
        self._granted[key] = size
        return True

    def release(self, key: Hashable) -> None:
        """Frees the room of `key`, if it has any."""
        self._granted.pop(key, None)

"""Values that were used lately, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Keeps the most recently used values."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        """`limit` is in bytes, and so is what `size` returns. A value that exceeds the limit alone is not kept."""
        self.limit = limit
        self.bytes = 0
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of `key`, made now if it is not here."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        if self._size(value) > self.limit:
            return value
        self._values[key] = value
        self.bytes += self._size(value)
        while self.bytes > self.limit:
            self.bytes -= self._size(self._values.popitem(last=False)[1])
        return value

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self.bytes = 0

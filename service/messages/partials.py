"""Which previews of a picture are the partial images that its caller asked for: the same for worker and gateway."""

from __future__ import annotations

MAX_PARTIAL_IMAGES = 3


class PartialImages:
    """Spreads `wanted` partial images of each picture evenly over the evaluations it may need."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._taken: dict[int, int] = {}

    def take(self, index: int, evaluation: int, evaluations: int) -> int | None:
        """Returns the number of the partial image that picture `index` owes after this evaluation, or None."""
        number = self._taken.get(index, 0)
        if number == self.wanted or evaluation * (self.wanted + 1) < evaluations * (number + 1):
            return None
        self._taken[index] = number + 1
        return number

    def missing(self, index: int) -> range:
        """The numbers of the partial images that picture `index` still owes."""
        return range(self._taken.get(index, 0), self.wanted)

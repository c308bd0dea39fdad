"""Checks that memory does not grow: the trend of every process after warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

import psutil

SAMPLES = 10  # per median
MARKS = 5  # medians shown, evenly spaced from start to end
PARTS = 10  # of the last two thirds, for the trend
MIN_SAMPLES = MARKS * SAMPLES  # fewer samples show nothing
ALLOWED_SHARE, ALLOWED_BYTES = 0.05, 16 << 20  # growth that caches and fragmentation may cause


class Memory:
    """Memory samples of every process; a size of 0 means that the process was not running."""

    def __init__(self) -> None:
        self._series: dict[str, list[int]] = {}

    def sample(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            if size:
                self._series.setdefault(name, []).append(size)

    def course(self) -> dict[str, list[float]]:
        """Bytes from start to end, for every process with enough samples."""
        return {name: _marks(sizes) for name, sizes in self._long().items()}

    def trend(self) -> dict[str, float]:
        """Growth in bytes over the last two thirds of the samples, single steps left out.

        The samples are cut into ten parts. The growth is nine times the median difference between the minima of
        neighbouring parts: a leak raises all minima, a peak none, and a step to a new high-water mark one or two. If
        traffic comes and goes, so does memory. A leak also raises the last minimum above the first, by half as much at
        least; otherwise the growth is this difference.
        """
        return {name: _growth(sizes[len(sizes) // 3 :]) for name, sizes in self._long().items()}

    def grown(self) -> list[str]:
        """The processes that grew by more than 5 % plus 16 MiB."""
        course = self.course()
        return [name for name, rise in self.trend().items() if rise > ALLOWED_BYTES + ALLOWED_SHARE * course[name][0]]

    def _long(self) -> dict[str, list[int]]:
        return {name: sizes for name, sizes in self._series.items() if len(sizes) >= MIN_SAMPLES}


def _growth(sizes: Sequence[int]) -> float:
    bounds = [round(part * len(sizes) / PARTS) for part in range(PARTS + 1)]
    floors = [min(sizes[start:end]) for start, end in pairwise(bounds)]
    steady = median(later - earlier for earlier, later in pairwise(floors)) * (PARTS - 1)
    whole = floors[-1] - floors[0]
    return steady if whole >= steady / 2 else whole


def _marks(sizes: Sequence[int]) -> list[float]:
    starts = (round(mark * (len(sizes) - SAMPLES) / (MARKS - 1)) for mark in range(MARKS))
    return [median(sizes[start : start + SAMPLES]) for start in starts]


def resident(pid: int) -> int:
    """Resident memory of a process in bytes; 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0

"""Whether memory is flat: the trend of what each process uses, once the traffic has settled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

SAMPLES = 10  # that each median is of
MARKS = 5  # medians shown, evenly from start to end
PARTS = 10  # of the last two thirds, for the trend
LEAST = MARKS * SAMPLES  # samples, for anything to be said
ALLOWED_SHARE, ALLOWED_BYTES = 0.05, 16 << 20  # rise to be put down to caches and fragmentation


class Memory:
    """A series of samples of each process; 0 stands for one that was away."""

    def __init__(self) -> None:
        self._series: dict[str, list[int]] = {}

    def sample(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            if size:
                self._series.setdefault(name, []).append(size)

    def course(self) -> dict[str, list[float]]:
        """Bytes from start to end, of each process with samples enough."""
        return {name: _marks(sizes) for name, sizes in self._long().items()}

    def trend(self) -> dict[str, float]:
        """Bytes by which each rises over the last two thirds of its samples, steps aside.

        Of ten parts the least each went down to, and of these the median step from one to the next, nine times: a leak
        raises them all, a peak none, and a step to a new high-water mark one or two.
        """
        return {name: _rise(sizes[len(sizes) // 3 :]) for name, sizes in self._long().items()}

    def grown(self) -> list[str]:
        """The processes that rise by more than 5 % and 16 MiB."""
        return [
            name for name, rise in self.trend().items() if rise > ALLOWED_BYTES + ALLOWED_SHARE * self.course()[name][0]
        ]

    def _long(self) -> dict[str, list[int]]:
        return {name: sizes for name, sizes in self._series.items() if len(sizes) >= LEAST}


def _rise(sizes: Sequence[int]) -> float:
    bounds = [round(part * len(sizes) / PARTS) for part in range(PARTS + 1)]
    floors = [min(sizes[start:end]) for start, end in pairwise(bounds)]
    return median(later - earlier for earlier, later in pairwise(floors)) * (PARTS - 1)


def _marks(sizes: Sequence[int]) -> list[float]:
    starts = (round(mark * (len(sizes) - SAMPLES) / (MARKS - 1)) for mark in range(MARKS))
    return [median(sizes[start : start + SAMPLES]) for start in starts]


def resident(pid: int) -> int:
    """Bytes a process holds in memory; 0 if it is gone, or where there is no ``/proc``."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

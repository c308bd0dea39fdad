"""Whether memory is flat: the trend of what each process uses, once the traffic has settled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median

SAMPLES = 10  # that each median is of
MARKS = 5  # medians shown, evenly from start to end
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
        return {name: _marks(sizes, MARKS) for name, sizes in self._long().items()}

    def trend(self) -> dict[str, float]:
        """Bytes by which each rises over the last two thirds of its samples.

        That is the slope of Theil and Sen, the median of the slopes between any two of the samples (here, of medians
        of a few): a leak climbs all the while, but a peak, or one step to a new high-water mark, hardly moves it.
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
    marks = _marks(sizes, max(2, len(sizes) // SAMPLES))
    slopes = [(later - earlier) / (j - i) for (i, earlier), (j, later) in combinations(enumerate(marks), 2)]
    return median(slopes) * (len(marks) - 1)


def _marks(sizes: Sequence[int], number: int) -> list[float]:
    """Medians of ``SAMPLES`` samples each, evenly from the first to the last."""
    starts = (round(mark * (len(sizes) - SAMPLES) / (number - 1)) for mark in range(number))
    return [median(sizes[start : start + SAMPLES]) for start in starts]


def resident(pid: int) -> int:
    """Bytes a process holds in memory; 0 if it is gone, or where there is no ``/proc``."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

"""Whether memory is flat: what each process uses when the traffic has settled, and at the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

SAMPLES = 10  # that each median is of
MARKS = 5  # medians taken, evenly from start to end: a leak climbs at each of them, a high-water mark does not
ALLOWED_RATIO, ALLOWED_BYTES = 1.15, 32 << 20  # growth to be put down to caches and fragmentation


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
        return {name: _marks(sizes) for name, sizes in self._series.items() if len(sizes) >= MARKS * SAMPLES}

    def grown(self) -> list[str]:
        """The processes that use more than they should by now."""
        return [name for name, marks in self.course().items() if marks[-1] > ALLOWED_RATIO * marks[0] + ALLOWED_BYTES]


def _marks(sizes: Sequence[int]) -> list[float]:
    starts = (round(mark * (len(sizes) - SAMPLES) / (MARKS - 1)) for mark in range(MARKS))
    return [median(sizes[start : start + SAMPLES]) for start in starts]


def resident(pid: int) -> int:
    """Bytes a process holds in memory; 0 if it is gone, or where there is no ``/proc``."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

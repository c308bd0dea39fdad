"""Memory that this process may still take: what large pictures need is checked first, because a kernel only kills."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from patchforge.control_groups import own_groups

BYTES_PER_PIXEL = 24
"""Most that decoding and converting a picture takes at its peak; measured: 9 (greyscale) to 19 (PNG with alpha)."""
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_V2 = "memory.max", "memory.current", "inactive_file"


def require_memory_for(pixels: int) -> None:
    """Checks that a picture can be decoded.

    Raises:
        MemoryError: it would take more memory than there is.
    """
    needed, free = pixels * BYTES_PER_PIXEL, free_memory()
    if needed > free:
        raise MemoryError(f"{pixels} pixels take {needed >> 20} MiB; {int(free) >> 20} MiB are free")


def free_memory(root: Path = Path("/")) -> float:
    """Returns the bytes that may still be taken: the least of the machine's and of each control group's.

    Infinite if that is unknown. `root` is where `proc` and `sys` are.
    """
    return min((*_free_of_machine(root), *_free_of_groups(root)), default=math.inf)


def _free_of_machine(root: Path) -> Iterator[float]:
    for name, value in _read_table(root / "proc/meminfo"):
        if name == "MemAvailable:":
            yield value * 1024


def _free_of_groups(root: Path) -> Iterator[float]:
    for folder, version in own_groups("memory", root):
        try:
            yield _free_of_group(folder, *(_V2 if version == 2 else _V1))
        except (OSError, ValueError):  # no such group, or no limit
            continue


def _free_of_group(folder: Path, limit: str, usage: str, reclaimable: str) -> float:
    """Files in the cache count as used, but make room."""
    cached = dict(_read_table(folder / "memory.stat")).get(reclaimable, 0)
    return int((folder / limit).read_text()) - int((folder / usage).read_text()) + cached


def _read_table(path: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, value, *_ = line.split()
        yield name, int(value)

"""CPU cores and OpenMP threads: how many this process may use, how many are free, and how long waiting threads spin.

Nothing here imports torch, because the environment counts only until OpenMP is loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from patchforge.control_groups import own_groups

SPINS = "2000"
"""Rounds that a waiting thread of GNU OpenMP spins before it sleeps: about 50 microseconds."""
DEFAULT_SPINS = "300000"
"""GNU OpenMP's own default: a few milliseconds."""
USER_SETTINGS = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


def spin_shortly() -> None:
    """Let waiting threads sleep soon, here and in child processes, unless the user has set how they wait.

    Call it before torch is imported. If other processes leave too few cores, a spinning thread takes the time of the
    thread that it waits for: an operation then takes milliseconds instead of microseconds.
    """
    if not any(name in os.environ for name in USER_SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use: limited by its CPU affinity and by the quota of its control groups.

    A fraction of a core counts as one. `root` contains `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(min(_read_quotas(root), default=cores))))


def free_cores(root: Path = Path("/")) -> int:
    """Return the machine's cores that no other thread wants now. All cores, if the system does not tell."""
    cores = os.cpu_count() or 1
    try:
        running = (root / "proc/loadavg").read_text().split()[3].partition("/")[0]
    except OSError:  # not Linux
        return cores
    return max(0, cores + 1 - int(running))


def _read_quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group of this process allows."""
    for folder, version in own_groups("cpu", root):
        try:
            quota = _read_quota(folder) if version == 2 else _read_quota_v1(folder)
        except (OSError, ValueError):  # no such group, or no limit
            continue
        if quota is not None:
            yield quota


def _read_quota(folder: Path) -> float | None:
    """Read the quota of a version 2 group, in cores."""
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _read_quota_v1(folder: Path) -> float | None:
    """Read the quota of a version 1 group, in cores."""
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return None if quota < 0 else quota / period

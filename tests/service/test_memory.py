"""Memory that may still be taken, in a container or not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from patchforge.service import memory
from patchforge.service.memory import free_memory, require_memory_for

MIB = 1 << 20
V1, V2 = "5:memory:/docker/abc\n4:cpu:/docker/abc\n", "0::/system.slice/app\n"
MACHINE = {"proc/meminfo": "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n"}


def group(folder: str, limit: int | str, used: int, cached: int, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    root = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 5\n{names[2]} {cached}\n"
    return {f"{root}/{names[0]}": f"{limit}\n", f"{root}/{names[1]}": f"{used}\n", f"{root}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, math.inf),
        (MACHINE, 4096 * MIB),
        (MACHINE | {"proc/self/cgroup": V2}, 4096 * MIB),
        ({"proc/self/cgroup": V2} | group("system.slice/app", 512 * MIB, 400 * MIB, 50 * MIB), 162 * MIB),
        (MACHINE | {"proc/self/cgroup": V2} | group("system.slice/app", "max", 400 * MIB, 0), 4096 * MIB),
        ({"proc/self/cgroup": "0::/\n"} | group("", 512 * MIB, 400 * MIB, 0), 112 * MIB),  # as a container sees it
        ({"proc/self/cgroup": V2} | group("", 512 * MIB, 400 * MIB, 0), 112 * MIB),  # or like this
        ({"proc/self/cgroup": V1} | group("memory/docker/abc", 512 * MIB, 500 * MIB, MIB, 1), 13 * MIB),
        ({"proc/self/cgroup": V1} | group("memory", 512 * MIB, 500 * MIB, MIB, 1), 13 * MIB),
        (MACHINE | {"proc/self/cgroup": V1} | group("memory/docker/abc", 1 << 62, 500 * MIB, MIB, 1), 4096 * MIB),
    ],
)
def test_the_tightest_limit_counts(files: dict[str, str], free: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == free


def test_a_picture_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 162.0 * MIB)
    require_memory_for(1 << 21)
    with pytest.raises(MemoryError, match="274 MiB; 162 MiB are free"):
        require_memory_for(12_000_000)


def test_there_is_some_now() -> None:
    require_memory_for(1 << 16)

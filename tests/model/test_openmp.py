"""How many threads are used, and how they wait: the owner's settings take precedence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from patchforge.model.openmp import SPINS, free_cores, spin_shortly, usable_cores

V2 = "0::/system.slice/worker\n"
V1 = "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n"
HYBRID = "3:cpu,cpuacct:/docker/abc\n0::/\n"


def quota(folder: str, cores: float) -> dict[str, str]:
    """Files of a version 1 group."""
    return {f"{folder}/cpu.cfs_quota_us": str(round(cores * 100_000)), f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {}, 16),
        (V2, {"system.slice/worker/cpu.max": "max 100000\n"}, 16),
        (V2, {"system.slice/worker/cpu.max": "300000 100000\n"}, 3),
        (V2, {"system.slice/worker/cpu.max": "25000 50000\n"}, 1),
        (V2, {"system.slice/worker/cpu.max": "250000 100000\n"}, 3),
        (V2, {"system.slice/worker/cpu.max": "800000 100000\n", "system.slice/cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # as a container sees it
        (V2, {"cpu.max": "200000 100000\n"}, 2),  # or like this
        (V2, {"system.slice/worker/cpu.max": "6400000 100000\n"}, 16),
        (V2, {"system.slice/worker/cpu.max": "nonsense"}, 16),
        (V1, quota("cpu,cpuacct/docker/abc", 2), 2),
        (V1, quota("cpu,cpuacct/docker", 5) | quota("cpu,cpuacct/docker/abc", 6), 5),
        (V1, quota("cpu", 1.5), 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        (HYBRID, quota("cpu,cpuacct", 3), 3),
        ("", {}, 16),
    ],
)
def test_a_quota_bounds_the_cores(
    groups: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cores(tmp_path) == cores


def test_without_control_groups_every_core_counts_that_the_process_may_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cores(tmp_path) == 2


def test_free_cores_are_those_no_other_thread_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert free_cores(tmp_path) == 4, "nobody can tell"
    (tmp_path / "proc").mkdir()
    for running, free in ((1, 4), (3, 2), (5, 0), (9, 0)):
        (tmp_path / "proc/loadavg").write_text(f"0.52 0.58 0.59 {running}/467 4321\n")
        assert free_cores(tmp_path) == free


def test_threads_spin_shortly_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    spin_shortly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    spin_shortly()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_shortly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"

"""`make soak`: `patchforge soak` as an operator runs it, but shorter and with more faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import released
from tests.hostile import imported_from, write_hostile
from tests.processes import PATCHFORGE, run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_a_minute_of_everything_at_once(bundle_dir: Path, tmp_path: Path) -> None:
    options = ["--minutes", "0.4", "--hurry", "4", "--clients", "6", "--bundles", str(bundle_dir)]
    folder = write_hostile(tmp_path / "theirs")
    shown = run(*PATCHFORGE, "soak", *options, "--keep", tmp_path / "kept", cwd=folder, seconds=1700).stdout
    assert re.search(r"accepted = [1-9]\d*, completed = [1-9]\d*,.* lost = 0,", shown), shown
    assert re.search(r"(kill|terminate|pause) (worker|gateway)", shown), shown
    assert imported_from(folder) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_failovers_and_a_rolling_upgrade(bundle_dir: Path, tmp_path: Path) -> None:
    options = ["--minutes", "0.5", "--hurry", "2", "--clients", "6", "--bundles", str(bundle_dir)]
    changes = ["--sentinels", "--from-version", str(released.WHEELS[1])]
    shown = run(*PATCHFORGE, "soak", *options, *changes, "--keep", tmp_path / "kept", seconds=1700).stdout
    assert re.search(r"accepted = [1-9]\d*, completed = [1-9]\d*,.* lost = 0,", shown), shown
    assert re.search(r"(kill|pause|cut off) master", shown), shown
    for role in ("gateway", "worker"):
        assert re.search(rf"{role} to this version +│ 4 ", shown), shown

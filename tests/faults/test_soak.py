"""`patchforge soak` as an operator runs it, but shorter and with more faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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

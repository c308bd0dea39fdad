"""`patchforge sample`, killed ten times: `make test-samples` does the same with 50,000 samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchforge.service.soak.memory import ALLOWED_BYTES, ALLOWED_SHARE
from tests.faults.many_samples import check, draw


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_samples_killed_ten_times_are_complete_and_none_is_drawn_twice(bundle_dir: Path, tmp_path: Path) -> None:
    model, folder, npz, count = bundle_dir / "tiny-class", tmp_path / "samples", tmp_path / "all.npz", 3000
    made = draw(model, folder, npz, count, kills=10)
    assert made.killed
    check(model, folder, npz, count)
    assert made.peak_bytes <= made.warm_bytes * (1 + ALLOWED_SHARE) + ALLOWED_BYTES

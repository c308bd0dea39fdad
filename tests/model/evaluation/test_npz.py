"""Pictures in the ADM evaluation suite's form are read, some at a time, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from patchforge.model.errors import DataError
from patchforge.model.evaluation.npz import read_npz
from patchforge.service.cli.main import app


def pictures(count: int, darkest: int = 0, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(darkest, 256, (count, size, size + 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_pictures_are_read_some_at_a_time(tmp_path: Path, save: object) -> None:
    wanted = pictures(7)
    save(tmp_path / "a.npz", wanted)  # type: ignore[operator]
    parts = list(read_npz(tmp_path / "a.npz", 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert (np.concatenate(parts) == wanted).all()


@pytest.mark.parametrize(
    "array",
    [pictures(2).astype(float), pictures(2)[..., :2], pictures(2)[0], np.array([{}], dtype=object), np.zeros(3)],
    ids=["float", "two channels", "one picture", "objects", "numbers"],
)
def test_what_is_not_pictures_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(DataError, match=r"a\.npz"):
        list(read_npz(tmp_path / "a.npz", 3))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pictures(5))
    whole = (tmp_path / "a.npz").read_bytes()
    for broken in (b"", whole[:300], whole[:-100], whole.replace(b"arr_0", b"arr_1"), whole[:900] + b"x" + whole[901:]):
        (tmp_path / "b.npz").write_bytes(broken)
        with pytest.raises(DataError, match=r"b\.npz"):
            list(read_npz(tmp_path / "b.npz", 3))


def test_sets_of_pictures_are_compared(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", pictures(24))
    np.savez(tmp_path / "light.npz", pictures(24, darkest=200))
    figures = {}
    for name in ("real", "light"):
        out = tmp_path / f"{name}.json"
        words = ["compare", str(tmp_path / f"{name}.npz"), str(tmp_path / "real.npz"), "--out", str(out)]
        ran = CliRunner().invoke(app, words)
        assert ran.exit_code == 0, ran.output
        assert "24 samples, 24 real pictures" in ran.output
        figures[name] = json.loads(out.read_text())
    assert figures["real"]["frechet distance"]["value"] < 1e-3 < figures["light"]["frechet distance"]["value"]
    assert figures["real"]["precision"]["value"] == figures["real"]["recall"]["value"] == 1
    np.savez(tmp_path / "one.npz", pictures(1))
    refused = CliRunner().invoke(app, ["compare", str(tmp_path / "one.npz"), str(tmp_path / "real.npz")])
    assert refused.exit_code == 1

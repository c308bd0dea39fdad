"""`patchforge eval` against a file of real pictures: any model, any judge, the ADM evaluation suite's files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from patchforge.model.errors import DataError
from patchforge.model.evaluation.against import measure_against
from patchforge.model.evaluation.judge import Judge
from patchforge.model.evaluation.npz import read_npz, write_npz
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import read_manifest
from patchforge.service.cli.main import app
from tests.model.shapes import shapes

COUNT = 24
DRAWING = "--sampler", "euler", "--steps", "2", "--guidance", "1", "--seed", "5"


def call(*words: object, status: int = 0) -> str:
    ran = CliRunner().invoke(app, [*map(str, words)])
    assert ran.exit_code == status, ran.output
    return ran.output


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of shapes, as the suite has them: among other arrays, which are not pictures."""
    path = tmp_path_factory.mktemp("real") / "real.npz"
    np.savez(path, arr_0=shapes().resized(32).images[:40], mu=np.zeros(4), sigma=np.eye(4))
    return path


def test_an_imported_model_is_measured_as_its_samples_are_compared(
    bundle_dir: Path, real: Path, tmp_path: Path
) -> None:
    bundle, npz, out = bundle_dir / "tiny-class", tmp_path / "made.npz", tmp_path / "made.json"
    shown = call("eval", bundle, "--reference", real, "--pictures", COUNT, *DRAWING, "--npz", npz, "--out", out)
    assert "frechet distance" in shown
    assert "reconstructions" in shown
    figures = json.loads(out.read_text())
    assert (figures["features"], figures["reference"]) == ("efficientnet_lite0", "real.npz")
    assert set(figures["measures"]) == {"frechet_distance", "precision", "recall"}
    distances = figures["measures"]["frechet_distance"]
    assert distances["real"]["value"] < 0.5 * distances["made"]["value"]
    assert set(distances) == {"made", "reconstructed", "real"}

    call("compare", npz, real, "--out", tmp_path / "compared.json")
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert compared["frechet distance"] == distances["made"]
    assert compared["recall"] == figures["measures"]["recall"]["made"]

    sampled = tmp_path / "sampled.npz"
    words = "--count", COUNT, "--balanced", *DRAWING, "--out", tmp_path / "samples", "--npz", sampled
    call("sample", "--model", bundle, *words)
    with np.load(npz) as ours, np.load(sampled) as theirs:
        assert (ours["arr_0"] == theirs["arr_0"]).all()


def test_the_bound_has_as_many_pictures_as_were_made(pipelines: dict[str, Pipeline], real: Path) -> None:
    class Colours:
        def features(self, images: np.ndarray) -> object:
            import torch

            return torch.as_tensor(images).float().mean(dim=(1, 2))

    pipeline = pipelines["tiny-class"]
    sampler = pipeline.sampler("euler", 1, 1.0)
    few, many = (measure_against(pipeline, Colours(), real, sampler, ["cat"] * n) for n in (5, 20))  # type: ignore[arg-type]
    few_bound, many_bound = (each.measures["frechet_distance"].real for each in (few, many))
    assert few_bound is not None
    assert many_bound is not None
    assert few_bound.value > many_bound.value


def test_any_judge_measures_and_a_text_model_takes_prompts(bundle_dir: Path, real: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("apple\npear\n")
    bundle, out = bundle_dir / "tiny-text", tmp_path / "made.json"
    original = (bundle / "bundle.json").read_bytes()
    asked = "--reference", real, "--prompts", tmp_path / "prompts.txt", "--features", "judge", "--pictures", COUNT
    try:
        call("eval", bundle, *asked, *DRAWING, "--out", out, "--record")
        figures = json.loads(out.read_text())
        assert read_manifest(bundle).evaluation == figures
    finally:
        (bundle / "bundle.json").write_bytes(original)
    assert figures["features"] == "judge"
    assert figures["judge"] == Judge.load().summary
    assert figures["patch_evaluations"] == 2 * 16


def test_natural_pictures_of_a_table_are_measured_without_a_judge_of_their_classes(
    bundle_dir: Path, tmp_path: Path
) -> None:
    shapes().resized(32).save(tmp_path / "table.npz")
    out = tmp_path / "made.json"
    words = "--data", tmp_path / "table.npz", "--features", "efficientnet_lite0", "--pictures", COUNT, "--out", out
    call("eval", bundle_dir / "tiny-class", *words, *DRAWING)
    figures = json.loads(out.read_text())
    assert set(figures["measures"]) == {"frechet_distance", "precision", "recall"}
    assert figures["features"] == "efficientnet_lite0"
    assert figures["calibration"] == {}


def test_what_cannot_be_measured_is_said(bundle_dir: Path, real: Path, tmp_path: Path) -> None:
    big, few, bundle = tmp_path / "big.npz", tmp_path / "few.npz", bundle_dir / "tiny-class"
    np.savez(big, np.zeros((9, 64, 48, 3), np.uint8))
    np.savez(few, np.zeros((3, 32, 32, 3), np.uint8))
    damaged = tmp_path / "damaged.npz"
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    np.savez_compressed(damaged, arr_0=noise // 128)
    inside = bytearray(damaged.read_bytes())
    inside[200:220] = bytes(range(235, 255))
    damaged.write_bytes(inside)
    for words, said in (
        (["--reference", big], "pictures of 48×64 pixels, but tiny-class draws 32×32"),
        (["--reference", few], "more than 3 pictures are needed"),
        (["--reference", tmp_path / "absent.npz"], "absent.npz: not an .npz"),
        (["--reference", damaged], "damaged.npz: not an .npz"),
        (["--reference", real, "--features", "inception"], "choose from judge, efficientnet_lite0"),
        (["--reference", real, "--part", "quality"], "--part is for --data"),
        (["--reference", real, "--npz", tmp_path / "a.zip"], "--npz must end in .npz"),
        (["--npz", tmp_path / "a.npz"], "are for --reference"),
    ):
        shown = call("eval", bundle, *words, "--pictures", 10, *DRAWING, status=1)
        assert said in " ".join(shown.split()).replace("- ", "-"), shown
    shown = call("eval", bundle_dir / "tiny-text", "--reference", real, status=1)
    assert "give --prompts" in " ".join(shown.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.npz", "damaged.npz", "few.npz"]


def test_pictures_are_measured_without_holding_them(pipelines: dict[str, Pipeline], tmp_path: Path) -> None:
    pipeline, count = pipelines["tiny-class"], 1500
    write_npz(tmp_path / "real.npz", 2000, (np.full((100, 32, 32, 3), shade, np.uint8) for shade in range(20)))

    class Shades:
        def features(self, images: np.ndarray) -> object:
            import torch

            return torch.as_tensor(images).float().mean(dim=(1, 2))

    words = ["cat", "dog"] * (count // 2)
    tracemalloc.start()
    try:
        sampler = pipeline.sampler("euler", 1, 1.0)
        found = measure_against(pipeline, Shades(), tmp_path / "real.npz", sampler, words, 0, tmp_path / "a.npz")  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < count * 32 * 32 * 3 / 2
    finally:
        tracemalloc.stop()
    assert found.patch_evaluations == 16
    assert sum(map(len, read_npz(tmp_path / "a.npz", 64))) == count


def test_a_file_of_other_pictures_than_promised_is_not_left(tmp_path: Path) -> None:
    small, wide = (np.zeros((2, 4, side, 3), np.uint8) for side in (4, 5))
    for count, portions, said in (
        (4, [small, wide], "after some of"),
        (4, [small, small.astype(float)], "float64"),
        (4, [small], "2 pictures instead of 4"),
        (2, [small, small], "4 pictures instead of 2"),
    ):
        with pytest.raises(DataError, match=said):
            write_npz(tmp_path / "a.npz", count, portions)
    assert list(tmp_path.iterdir()) == []

"""The doctor finds nothing wrong with what is right, and says so when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from patchforge.model import doctor
from patchforge.model.pipeline import Pipeline
from patchforge.service.cli.main import app


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_a_bundle_that_is_right(name: str, bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", str(bundle_dir / name), "--threads", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = {each["name"]: each for each in json.loads(out.read_text())}
    assert {each["ok"] for each in found.values()} == {True, None}
    assert found[f"{name}: packed as alone"]["ok"] is True
    assert found[f"{name}: samplers"]["found"] == "all 6 draw"
    sizes = [f"{name}: {width}×{height}" for width, height in Pipeline.open(bundle_dir / name).grids]
    assert sizes
    for size in sizes:
        drawn = re.fullmatch(r"([\d.]+) s a picture alone, its first preview after ([\d.]+) s", found[size]["found"])
        assert drawn is not None
        assert float(drawn[1]) >= float(drawn[2])
    assert "patches/s" in found[f"{name}: speed"]["found"]
    assert "float32" in found["matrix products"]["found"]


def test_what_is_wrong_is_named(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packed_difference", lambda pipeline: 0.3)
    monkeypatch.setattr(doctor, "_draws", lambda pipeline, name: name != "heun")
    result = CliRunner().invoke(app, ["doctor", str(bundle_dir / "tiny-text"), "--threads", "1"])
    assert result.exit_code == 1
    assert "not finite: heun" in result.output
    assert result.output.count("NO") == 2


def test_a_difference_of_one_picture_is_found(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.open(bundle_dir / "tiny-text")
    assert doctor.packed_difference(pipeline) <= doctor.EXACT
    evaluate = pipeline.denoiser.evaluate

    def disturbed(evaluations: list[doctor.Evaluation]) -> list[object]:
        found = evaluate(evaluations)
        if len(evaluations) > 1:
            found[-1].velocity.mul_(1.01)
        return list(found)

    monkeypatch.setattr(pipeline.denoiser, "evaluate", disturbed)
    with torch.inference_mode():
        assert doctor.packed_difference(pipeline) > doctor.EXACT


def test_a_faster_precision_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 100.0, torch.bfloat16: 180.0}
    monkeypatch.setattr(doctor, "matmul_peak", lambda device, dtype: speeds[dtype])
    checks = {each.name: each for each in doctor.machine_facts(torch.device("cpu"))}
    assert checks["matrix products"].advice == "PATCHFORGE_PRECISION=bfloat16 may be up to 1.8 times as fast"
    speeds[torch.bfloat16] = 110.0
    checks = {each.name: each for each in doctor.machine_facts(torch.device("cpu"))}
    assert checks["matrix products"].advice == ""


def test_an_unknown_bundle_or_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["doctor", "nothing", "--threads", "1"]).exit_code == 1
    monkeypatch.setenv("PATCHFORGE_DEVICE", "cuda:99")
    result = CliRunner().invoke(app, ["doctor", "--threads", "1"])
    assert result.exit_code == 1
    assert "cannot be used here" in result.output

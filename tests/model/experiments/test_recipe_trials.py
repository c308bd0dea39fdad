"""Trials of the recipe: each changes one thing at equal samples; the command compares them and fills the page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from patchforge.model.experiments.claims_training import Setting
from patchforge.model.experiments.recipe_trials import RECIPE, TRIALS
from patchforge.service.cli.main import app
from tests.model.shapes import trained_in_a_moment


@pytest.mark.parametrize("name", sorted(set(TRIALS) - {RECIPE}))
def test_a_trial_changes_one_thing_and_sees_as_many_samples(name: str) -> None:
    base = Setting(steps=600).recipe("mixed")
    recipe = TRIALS[name].recipe(base)
    assert recipe.steps * recipe.batch == base.steps * base.batch
    changed = {key for key, value in asdict(recipe).items() if value != asdict(base)[key]}
    assert changed - {"steps", "batch", "sample_every"} == set(TRIALS[name].changes)
    assert changed


def test_the_command_trains_in_pairs_and_fills_the_page(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data, bundle = trained_in_a_moment(tmp_path)
    page, out = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("before\n<!-- begin: recipe -->\n<!-- end: recipe -->\nafter\n")
    words = ["bench", "recipe", "--folder", str(tmp_path / "trials"), "--data", str(data), "--latents-of", str(bundle)]
    words += ["--judge", str(tmp_path / "judge"), "--steps", "40", "--batch", "8", "--width", "32", "--depth", "1"]
    words += ["--pictures", "20", "--threads", "1", "--out", str(out), "--doc", str(page)]
    result = CliRunner().invoke(app, [*words, "--trial", "adamw", "--trial", "double"])
    assert result.exit_code == 0, result.output
    first, adamw, double = json.loads(out.read_text())
    assert [row["key"] for row in (first, adamw, double)] == ["recipe", "adamw", "double"]
    assert "error_difference" not in first
    bundles = (tmp_path / "trials" / name / f"{name}-bundle" for name in ("recipe", "adamw"))
    weights = [(bundle / "model.safetensors").read_bytes() for bundle in bundles]
    assert weights[0] != weights[1], "another optimiser trains other weights, though 40 steps may show little of it"
    assert adamw["error_difference"]["value"] == pytest.approx(
        adamw["error"]["value"] - first["error"]["value"], abs=2e-5
    )
    assert (double["steps"], double["batch"]) == (20, 16)
    assert "| twice the batch, half the steps | 20 × 16 |" in page.read_text()
    unknown = CliRunner().invoke(app, [*words, "--trial", "magic"])
    assert "choose from recipe" in unknown.output

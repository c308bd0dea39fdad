"""The comparison of schedules and samplers: complete, resumable, and fair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from patchforge.model.experiments.claims import BASELINE, cases
from patchforge.model.samplers import make_sampler
from patchforge.model.storage.bundle import open_bundle
from patchforge.model.types import Grid
from patchforge.service.cli.main import app
from patchforge.service.cli.report import write_table
from patchforge.service.errors import InvalidRequest
from tests.model.shapes import trained_in_a_moment

GRID = Grid(4, 4, 2, 4)


@pytest.mark.parametrize("evaluations", [8, 32])
def test_every_case_costs_the_same(evaluations: int) -> None:
    for case in cases(evaluations):
        sampler = make_sampler(case.sampler, GRID, case.steps, 1.0, **case.options)
        least = evaluations - 3 if case.sampler == "look_ahead" else evaluations
        assert least <= sampler.evaluations <= evaluations


def test_schedules_are_compared_by_the_same_sampler_and_samplers_on_the_same_model() -> None:
    listed = cases(32)
    schedules = [case for case in listed if case.key == case.schedule]
    assert len(schedules) == 5
    assert len({(case.sampler, case.steps) for case in schedules}) == 1
    assert {case.schedule for case in listed if case not in schedules} == {BASELINE}


def test_the_command_trains_compares_resumes_and_fills_the_page(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data, bundle = trained_in_a_moment(tmp_path)
    page, out, folder = tmp_path / "page.md", tmp_path / "rows.json", tmp_path / "claims"
    page.write_text("before\n<!-- begin: claims -->\n<!-- end: claims -->\nafter\n")
    words = ["bench", "claims", "--folder", str(folder), "--data", str(data), "--judge", str(tmp_path / "judge")]
    words += ["--latents-of", str(bundle), "--steps", "3", "--batch", "8", "--width", "32", "--depth", "1"]
    words += ["--pictures", "20", "--evaluations", "4", "--threads", "1", "--out", str(out), "--doc", str(page)]
    first = CliRunner().invoke(app, [*words, "--schedule", "ltg"])
    assert first.exit_code == 0, first.output
    trained = open_bundle(folder / "ltg" / "ltg-bundle").manifest
    assert {row["key"] for row in json.loads(out.read_text())} == {
        "real",
        "ltg",
        "dual_loop",
        "look_ahead",
        "multistep",
    }
    again = CliRunner().invoke(app, [*words, "--schedule", "ltg", "--schedule", "sit"])
    assert again.exit_code == 0, again.output
    assert open_bundle(folder / "ltg" / "ltg-bundle").manifest == trained  # it was not trained again
    rows = {row["key"]: row for row in json.loads(out.read_text())}
    assert set(rows["sit"]["differences"]) == {"distance", "precision", "recall", "sharpness", "own distance"}
    less = rows["sit"]["differences"]["distance"]
    assert (
        less["low"]
        <= less["value"]
        == pytest.approx(rows["sit"]["distance"]["value"] - rows["ltg"]["distance"]["value"], abs=1e-3)
    )
    assert rows["ltg"]["differences"] == {}
    assert rows["real"]["sharpness"]["value"] == 1
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| LTG, Euler | 4 |" in text
    other = CliRunner().invoke(app, [*words, "--schedule", "ltg", "--batch", "4"])
    assert other.exit_code == 1
    assert "with another recipe" in other.output
    uneven = CliRunner().invoke(app, [*words, "--evaluations", "6"])
    assert "multiple of 4" in uneven.output


@pytest.mark.parametrize(
    ("page", "mark"),
    [
        ("claims.md", "claims"),
        ("training.md", "recipe"),
        ("samplers.md", "samplers"),
        ("samplers.md", "leaps"),
        ("engine.md", "forward"),
        ("engine.md", "threads, emoji-class"),
        ("engine.md", "threads, emoji-text"),
        ("engine.md", "engine"),
        ("engine.md", "engine at equal p95"),
        *(
            ("models.md", f"{bundle} {table}")
            for bundle in ("emoji-text", "emoji-class")
            for table in ("measures", "ranking uniform", "reliability uniform")
        ),
    ],
)
def test_the_pages_have_room_for_what_the_commands_measure(page: str, mark: str, tmp_path: Path) -> None:
    original = (Path("docs") / page).read_text(encoding="utf-8")
    copy = tmp_path / page
    copy.write_text(original, encoding="utf-8")
    write_table(copy, mark, ["a"], [["x|y"]])
    text = copy.read_text(encoding="utf-8")
    assert "| x\\|y |" in text
    before, after = original.split(f"<!-- begin: {mark} -->")[0], original.split(f"<!-- end: {mark} -->")[1]
    assert text.startswith(before)
    assert text.endswith(after)


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        write_table(page, "claims", ["a"], [])
    page.write_text("nothing to fill")
    with pytest.raises(InvalidRequest, match="no marks"):
        write_table(page, "claims", ["a"], [["1"]])
    assert page.read_text() == "nothing to fill"

"""The judge and its measures: right for real pictures, at chance for noise, and never measured on its training set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from patchforge.model.errors import DataError, ModelError
from patchforge.model.evaluation.evaluate import evaluate
from patchforge.model.evaluation.grid import _draw_concepts
from patchforge.model.evaluation.judge import Judge, unseen
from patchforge.model.evaluation.judge_training import JudgeRecipe, train_judge
from patchforge.model.evaluation.measure import Ranks, measure_top, rank_of_own
from patchforge.model.evaluation.prompts import candidates, measure_prompts
from patchforge.model.evaluation.quality import split_pictures
from patchforge.model.evaluation.samples import Made, make_pictures
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import read_manifest
from patchforge.model.training.data import Pictures
from patchforge.service.cli.main import app
from tests.model.shapes import shapes


@pytest.fixture(scope="module")
def table() -> Pictures:
    return shapes()


@pytest.fixture(scope="module")
def judge_folder(table: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judge")
    torch.set_num_threads(1)
    train_judge(table, out, JudgeRecipe(steps=90, batch=32, shift=1), "none")
    return out


@pytest.fixture(scope="module")
def judge(judge_folder: Path) -> Judge:
    return Judge.load(judge_folder)


def test_a_judge_is_judged_on_pictures_it_was_not_trained_on(table: Pictures) -> None:
    new, held_out = unseen(table), table.held_out()
    assert not (new & held_out).any()
    assert 4 < new.sum() < 40
    # A concept that is new in one style is known from the other style.
    known = {concept for concept, hidden in zip(table.concepts, new | held_out, strict=True) if not hidden}
    assert any(table.concepts[row] in known for row in np.flatnonzero(new))


def test_a_judge_learns_and_keeps_what_it_learnt(table: Pictures, judge: Judge, judge_folder: Path) -> None:
    accuracy = json.loads((judge_folder / "judge.json").read_text())["accuracy"]
    of_known = accuracy["unseen pictures of known concepts"]
    assert of_known["pictures"] == unseen(table).sum()
    assert of_known["class"] > 0.8
    part = table.where(~unseen(table))
    right = judge.class_scores(judge.features(part.images)).argmax(1) == torch.from_numpy(part.classes)
    assert right.float().mean() > 0.8
    assert judge.features(part.images[:5]).shape == (5, 128)
    torch.testing.assert_close(Judge.load(judge_folder).features(part.images[:5]), judge.features(part.images[:5]))


def test_a_prompt_scores_its_own_pictures_highest(table: Pictures, judge: Judge) -> None:
    rows = [row for row in range(len(table)) if table.styles[row] == "flat" and "huge" in table.concepts[row]]
    texts = judge.embed([f"{table.concepts[row]}, flat" for row in rows])
    scores = judge.text_scores(judge.features(table.images[rows]), texts)
    assert scores.shape == (len(rows), len(rows))
    ranks = rank_of_own(-scores.T, torch.arange(len(rows)))
    assert ranks.float().mean() < len(rows) / 4  # chance would be half of them
    assert judge.without_style("red apple, 3d") == "red apple"
    assert judge.without_style("salt, pepper") == "salt, pepper"
    assert judge.without_style("3d") == "3d"


def test_what_is_no_judge_is_refused(tmp_path: Path, judge_folder: Path) -> None:
    with pytest.raises(DataError, match="not a judge"):
        Judge.load(tmp_path)
    (tmp_path / "judge.json").write_text((judge_folder / "judge.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((judge_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError):
        Judge.load(tmp_path)


def test_the_shipped_judge_knows_an_apple_from_a_heart() -> None:
    judge = Judge.load()
    assert "food-fruit" in judge.class_names
    assert {"3d", "flat", "noto", "blob"} <= set(judge.styles)
    assert judge.record["accuracy"]["unseen pictures of known concepts"]["class"] > 0.5


def test_a_tie_is_not_a_find() -> None:
    distances = torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert rank_of_own(distances, torch.tensor([0, 1])).tolist() == [1, 0]


def test_shares_of_ranks_come_with_chance_and_wider_intervals_for_shared_concepts() -> None:
    ranks = torch.arange(300) % 10
    alone = measure_top("x", {"made": Ranks(ranks, [str(i) for i in range(300)])}, [(10, 1)])
    shared = measure_top(
        "x", {"made": Ranks(ranks[:30].repeat_interleave(10), [str(i // 10) for i in range(300)])}, [(10, 1)]
    )
    assert alone["x_top1"].made.value == pytest.approx(0.1)
    assert alone["x_top5"].made.value == pytest.approx(0.5)
    assert alone["x_top5"].chance == 0.5
    width = [each["x_top5"].made.high - each["x_top5"].made.low for each in (alone, shared)]
    assert width[1] > 2 * width[0]
    mixed = measure_top("x", {"made": Ranks(ranks, [str(i) for i in range(300)])}, [(4, 75), (10, 225)])
    assert mixed["x_top1"].chance == pytest.approx(0.25 * 0.25 + 0.75 * 0.1)
    assert mixed["x_top5"].chance == pytest.approx(0.25 * 1 + 0.75 * 0.5)


def test_halves_of_the_real_pictures_do_not_meet_and_hold_nothing_held_out(table: Pictures) -> None:
    split = split_pictures(table, 80)
    assert len(split.real) == 80
    keys = [{(c, s) for c, s in zip(p.concepts, p.styles, strict=True)} for p in (split.reference, split.real)]
    assert not keys[0] & keys[1]
    held_out = {table.concepts[row] for row in np.flatnonzero(table.held_out())}
    assert not held_out & {concept for each in keys for concept, _ in each}
    with pytest.raises(DataError, match="only"):
        split_pictures(table, 1000)


def test_real_pictures_beat_the_noise_of_an_untrained_model(
    pipelines: dict[str, Pipeline], table: Pictures, judge: Judge
) -> None:
    pipeline = pipelines["tiny-class"]
    report = evaluate(pipeline, judge, table, pipeline.default_sampler(), 60, ("quality", "calibration"))
    distance, classes = report.measures["frechet_distance"], report.measures["class_top1"]
    assert distance.real is not None
    assert distance.real.value < 0.2 * distance.made.value
    recall = report.measures["recall"]
    assert recall.real is not None
    assert recall.real.value > 0.5 > recall.made.value
    assert classes.real is not None
    assert classes.real.value > classes.made.value
    assert classes.chance == 0.5
    assert report.measures["layout_class_top1"].real is not None
    assert report.measures["layout_class_top1"].real.value > 0.8
    assert "style_top1" not in report.measures  # a class-conditional model takes no style
    assert report.patch_evaluations is not None
    assert report.patch_evaluations > 0
    assert {name: len(each.reliability) for name, each in report.calibration.items()} == {"uniform": 10, "ltg": 10}
    assert json.loads(json.dumps(report.figures(), allow_nan=False)) == report.figures()


def test_the_judge_finds_the_real_pictures_of_prompts_and_noise_only_by_chance(
    pipelines: dict[str, Pipeline], table: Pictures, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines["tiny-text"]
    measures = measure_prompts(pipeline, judge, table, pipeline.default_sampler())
    prompt = measures["prompt_top5"]
    assert prompt.real is not None
    assert prompt.chance is not None
    assert prompt.real.value > prompt.chance
    assert measures["layout_top1"].real is None

    def real(pipeline: Pipeline, sampler: Any, words: list[str], seeds: Any, label: str) -> Made:
        rows = [list(zip(table.concepts, table.styles, strict=True)).index(tuple(each.split(", "))) for each in words]
        return Made(torch.from_numpy(table.images[rows]), 1, 0)

    monkeypatch.setattr("patchforge.model.evaluation.prompts.make_pictures", real)
    perfect = measure_prompts(pipeline, judge, table, pipeline.default_sampler())
    assert perfect["layout_top1"].made.value == 1
    assert perfect["prompt_top1"].made == perfect["prompt_top1"].real


def test_candidates_are_one_a_concept_and_new_to_the_judge(table: Pictures) -> None:
    part, new = candidates(table, "flat")
    assert len(set(part.concepts)) == len(part)
    assert set(part.styles) == {"flat"}
    hidden = {c for c, h in zip(table.concepts, table.held_out(), strict=True) if h}
    assert [concept in hidden for concept in part.concepts] == new.tolist()


def test_a_judge_of_other_classes_or_styles_is_refused_before_anything_is_drawn(
    table: Pictures, judge: Judge, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr("patchforge.model.evaluation.evaluate.make_pictures", draw)
    pipeline = pipelines["tiny-class"]
    styles = ["round" if style == "flat" else style for style in table.styles]
    for other in (replace(table, class_names=["dog", "cat"]), replace(table, styles=styles)):
        with pytest.raises(DataError, match="other classes or styles"):
            evaluate(pipeline, judge, other, pipeline.default_sampler(), 40, ["quality"])


def test_the_number_of_pictures_that_an_error_names_is_possible(table: Pictures) -> None:
    odd = table.rows(np.flatnonzero(table.trained())[: 2 * (np.count_nonzero(table.trained()) // 2) - 1])
    with pytest.raises(DataError, match="only") as told:
        split_pictures(odd, len(odd))
    count = int(str(told.value).split()[-1])
    split = split_pictures(odd, count)
    assert len(split.real) == count <= len(split.reference)


def test_pictures_of_the_same_seed_are_the_same(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-class"]
    sampler = pipeline.sampler("euler", 2, 1.0)
    many = make_pictures(pipeline, sampler, ["cat", "dog"] * 20, range(40))
    few = make_pictures(pipeline, sampler, ["dog"], [33])
    assert torch.equal(many.pictures[33], few.pictures[0])
    assert many.patch_evaluations == 2 * 16
    assert many.saved == 0


def test_the_command_evaluates_records_and_draws(
    bundle_dir: Path, table: Pictures, judge_folder: Path, tmp_path: Path
) -> None:
    data, out, plots = tmp_path / "table.npz", tmp_path / "figures" / "text.json", tmp_path / "plots"
    table.save(data)
    page = tmp_path / "page.md"
    marks = [f"tiny-text {name}" for name in ("measures", "ranking uniform", "reliability uniform")]
    page.write_text("\n".join(f"<!-- begin: {mark} -->\n<!-- end: {mark} -->\n" for mark in marks))
    bundle = bundle_dir / "tiny-text"
    original = (bundle / "bundle.json").read_bytes()
    shared = ["--data", str(data), "--judge", str(judge_folder), "--threads", "1"]
    words = ["--sampler", "euler", "--steps", "2", "--guidance", "1", "--pictures", "40"]
    try:
        result = CliRunner().invoke(
            app,
            [
                "eval",
                str(bundle),
                *shared,
                *words,
                "--out",
                str(out),
                "--plots",
                str(plots),
                "--doc",
                str(page),
                "--record",
            ],
        )
        assert result.exit_code == 0, result.output
        assert "frechet distance" in result.stdout
        figures = json.loads(out.read_text())
        assert figures["sampler"] == {"name": "euler", "steps": 2, "guidance": 1.0}
        assert set(figures["measures"]) > {"frechet_distance", "prompt_top1", "style_top1", "layout_top1"}
        assert read_manifest(bundle).evaluation == figures
        assert "| frechet distance |" in page.read_text()
        assert "| 0.95 |" in page.read_text()
    finally:
        (bundle / "bundle.json").write_bytes(original)
    assert {path.name for path in plots.iterdir()} == {"measures.svg", "calibration.svg"}
    for wrong, said in (
        (["--part", "beauty"], "choose from outside, quality, prompts, calibration"),
        (["--option", "quantile"], "not name=value"),
        (["--option", "speed=3"], "not an option of"),
        (["--pictures", "1000"], "half of the training pictures"),
    ):
        refused = CliRunner().invoke(app, ["eval", str(bundle), *shared, *wrong])
        assert refused.exit_code == 1, refused.output
        assert said in refused.output.replace("\n", " ")


def test_a_grid_has_a_hundred_pictures_beside_a_hundred_real_ones(
    bundle_dir: Path, table: Pictures, tmp_path: Path
) -> None:
    table.save(tmp_path / "table.npz")
    out = tmp_path / "grid.png"
    words = ["--data", str(tmp_path / "table.npz"), "--sampler", "euler", "--steps", "1", "--threads", "1"]
    result = CliRunner().invoke(app, ["grid", str(bundle_dir / "tiny-text"), "--out", str(out), *words])
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        width, height = picture.size
        real = np.asarray(picture)[:, width // 2 :]
    assert width > 2 * 10 * 32
    assert height > 10 * 32
    assert (real != 255).any(axis=-1).mean() > 0.1
    shown = table.where(_draw_concepts(table, 100, 0))
    assert set(zip(shown.concepts, shown.styles, strict=True)) <= {
        pair for pair, seen in zip(zip(table.concepts, table.styles, strict=True), table.trained(), strict=True) if seen
    }
    refused = CliRunner().invoke(app, ["grid", str(bundle_dir / "tiny-text"), "--out", str(tmp_path / "x.pn"), *words])
    assert refused.exit_code == 1


def test_bf16_beside_float32(bundle_dir: Path, table: Pictures, judge_folder: Path, tmp_path: Path) -> None:
    table.save(tmp_path / "table.npz")
    out, page = tmp_path / "precision.json", tmp_path / "page.md"
    page.write_text("<!-- begin: precision, tiny-text -->\n<!-- end: precision, tiny-text -->\n")
    words = ["--data", str(tmp_path / "table.npz"), "--judge", str(judge_folder), "--pictures", "40", "--threads", "1"]
    command = ["bench", "precision", str(bundle_dir / "tiny-text"), *words, "--out", str(out), "--doc", str(page)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["float32"]["packed_differs"], found["float32"]["packed_most"]) == (0, 0)
    assert found["psnr"] > 20
    assert "bfloat16" in found
    assert set(found["figures"]) == set(found["differences"]) >= {"found first", "sharpness", "own distance"}
    assert "| PSNR to float32, dB |" in page.read_text()
    refused = CliRunner().invoke(app, ["bench", "precision", str(bundle_dir / "tiny-class"), *words])
    assert refused.exit_code == 1
    assert "requires a text-to-image bundle" in " ".join(refused.output.split())

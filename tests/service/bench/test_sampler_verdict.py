"""Which sampler is taken for equal to which, and what the benchmark says of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.evaluation import leap
from model.evaluation.frechet import Gaussian, Interval
from model.evaluation.sampler_bench import Gallery, PictureQuality, Row, SamplerBench, cheapest_equal
from model.pipeline import Pipeline
from service.bench.sampler_cli import as_good_lines, leap_lines, verdict_lines

CLOSE, FAR = Interval(0.5, -1.0, 2.0), Interval(4.0, 1.0, 7.0)
FOUND, MISSED = Interval(-0.02, -0.05, 0.01), Interval(-0.1, -0.2, -0.03)


def row(sampler: str, patches: float, difference: Interval | None = CLOSE, found: Interval | None = FOUND) -> Row:
    quality = PictureQuality(Interval(40 + patches / 1000, 30, 50), difference, FOUND, FOUND, found)
    return Row(sampler, {"steps": 4}, patches, 0.0, patches / 10, 1.0, 1.0, 30.0, 0.0, quality)


@pytest.mark.parametrize(
    ("difference", "found", "equal"),
    [(CLOSE, FOUND, True), (FAR, FOUND, False), (CLOSE, MISSED, False), (Interval(-4.0, -7.0, -1.0), FOUND, True)],
    ids=["close", "farther from real", "found less often", "nearer to real"],
)
def test_what_is_not_told_from_the_baseline(difference: Interval, found: Interval, equal: bool) -> None:
    assert row("euler", 100, difference, found).quality.not_told is equal  # type: ignore[union-attr]


def test_the_baseline_itself_is_no_candidate() -> None:
    assert cheapest_equal([row("euler", 100, None, None)]) is None


def test_the_cheapest_equal_is_of_those_that_are() -> None:
    rows = [row("euler", 300), row("euler", 100, FAR), row("euler", 200)]
    assert cheapest_equal(rows) is rows[2]
    assert cheapest_equal(rows[1:2]) is None


def test_the_verdict_holds_each_equal_preset_against_the_paper_and_both_uniform_families() -> None:
    rows = {
        "paper": [row("dual_loop", 4000, None, None), row("look_ahead", 3000)],
        "uniform": [row("multistep", 500, FAR), row("multistep", 800)],
        "uniform, guidance interval": [row("adaptive", 600)],
        "paper, cheaper": [row("dual_loop", 900)],
        "adaptive": [row("adaptive", 200, FAR), row("adaptive", 400), row("adaptive", 700)],
        "adaptive, in part": [row("adaptive", 100)],
    }
    lines = verdict_lines(rows)
    assert [line[0] for line in lines] == ["standard"] * 3 + ["high"] * 3, "draft's pictures were told apart"
    assert [line[2] for line in lines] == ["13.3%", "50.0%", "66.7%", "23.3%", "87.5%", "116.7%"]
    assert "look_ahead" in lines[0][1], "the nearer to real pictures of the paper's two"
    assert verdict_lines(rows | {"uniform": []}) == []


class Seen:
    """A bench that finds the pictures of samplers of at least 600 patch evaluations as good as any."""

    def cheapest_as_good(self, rows: list[Row], as_this: Row) -> tuple[Row, Interval, Interval] | None:
        able = [row for row in rows if row.patch_evaluations >= 600]
        return (able[0], CLOSE, FOUND) if able else None


def test_each_preset_is_held_against_uniform_samplers_as_good_as_itself() -> None:
    presets = [row("adaptive", 150), row("adaptive", 300), row("adaptive", 600)]
    bench: Any = Seen()
    lines = as_good_lines(bench, {"uniform": [row("euler", 400), row("euler", 600)], "adaptive": presets})
    assert [line[0] for line in lines] == ["draft", "standard", "high"]
    assert [line[-2:] for line in lines] == [["25.0%", "25.0%"], ["50.0%", "50.0%"], ["100.0%", "100.0%"]]
    assert as_good_lines(bench, {"uniform": [row("euler", 400)], "adaptive": presets})[1][:2] == ["standard", "none"]
    assert as_good_lines(bench, {"uniform": [], "adaptive": presets}) == [], "where they were left out, nothing is said"


def test_the_cheapest_as_good_is_neither_farther_from_real_pictures_nor_less_often_found() -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randn(64, 4, generator=random)
    found = torch.ones(64)
    bench = SamplerBench.__new__(SamplerBench)
    judge: Any = None
    bench.gallery = Gallery(judge, Gaussian.of(real), [str(number) for number in range(64)], CLOSE)
    rows = [row(name, cost) for name, cost in (("far", 1), ("missed", 2), ("good", 4), ("dear", 5), ("ours", 3))]
    far = real + torch.tensor([3.0, 0, 0, 0])
    seen = {"far": (far, found), "missed": (real, found * 0), "good": (real, found), "dear": (real, found)}
    bench.seen = {f"{name} steps=4": each for name, each in (seen | {"ours": (real, found)}).items()}
    best = bench.cheapest_as_good(rows[:-1], rows[-1])
    assert best is not None
    assert best[0].sampler == "good"
    assert bench.cheapest_as_good(rows[:2], rows[-1]) is None


def test_leaps_are_measured_as_the_model_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(leap, "measure_leaps", lambda *arguments: asked.append(arguments) or [])
    pipeline = Pipeline.open(Path(__file__).parents[3] / "model/bundles/emoji-text")
    bench: Any = SimpleNamespace(conditions=[], seeds=[], guidance=3.0)
    assert leap_lines(bench, pipeline) == []
    draft, standard, high = [served for *_, served in asked]
    assert standard == pipeline.default_sampler()
    assert draft.steps < standard.steps < high.steps
    assert draft.guidance_until == high.guidance_until == standard.guidance_until < 1

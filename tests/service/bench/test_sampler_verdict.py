"""Which samplers count as equal, and what the benchmark reports about them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from patchforge.model.evaluation.frechet import Interval
from patchforge.model.experiments import leap
from patchforge.model.experiments.sampler_bench import PictureQuality, Row, SamplerBench, cheapest_equal
from patchforge.model.pipeline import Pipeline
from patchforge.service.cli.bench.sampler import as_good_lines, leap_lines, verdict_lines
from patchforge.service.messages.samplers import PRESETS

NEAR, BLURRED, FARTHER = Interval(-0.1, -0.4, 0.2), Interval(-0.1, -0.2, -0.05), Interval(4.0, 1.0, 7.0)
EQUAL = {"cosine": NEAR, "sharpness": NEAR, "distance": NEAR}


def row(sampler: str, patches: float, baseline: bool = False, **differences: Interval) -> Row:
    figures = {"cosine": Interval(0.5 - patches / 1e5, 0.4, 0.6), "sharpness": NEAR, "distance": FARTHER}
    quality = PictureQuality(figures, None if baseline else EQUAL | differences)
    return Row(sampler, {"steps": 4}, patches, 0.0, patches / 10, 1.0, 1.0, 30.0, 0.0, quality)


@pytest.mark.parametrize(
    ("differences", "named"),
    [
        ({}, []),
        ({"sharpness": BLURRED}, ["sharpness"]),
        ({"distance": FARTHER, "cosine": BLURRED}, ["cosine", "distance"]),
        ({"distance": BLURRED, "cosine": FARTHER}, []),
    ],
    ids=["close", "blurred", "farther from real and less alike", "better"],
)
def test_worse_in_one_figure_is_worse(differences: dict[str, Interval], named: list[str]) -> None:
    quality = row("euler", 100, **differences).quality
    assert quality is not None
    assert quality.worse == named
    assert quality.indistinguishable is (not named)


def test_the_baseline_itself_is_no_candidate() -> None:
    assert cheapest_equal([row("euler", 100, baseline=True)]) is None


def test_the_cheapest_equal() -> None:
    rows = [row("euler", 300), row("euler", 100, sharpness=BLURRED), row("euler", 200)]
    assert cheapest_equal(rows) is rows[2]
    assert cheapest_equal(rows[1:2]) is None


def test_the_verdict_compares_equal_presets_with_the_paper_and_both_uniform_families() -> None:
    rows = {
        "paper": [row("dual_loop", 4000, baseline=True), row("look_ahead", 3000)],
        "uniform": [row("multistep", 500, cosine=BLURRED), row("multistep", 800)],
        "uniform, guidance interval": [row("adaptive", 600)],
        "paper, cheaper": [row("dual_loop", 900)],
        "adaptive": [row("adaptive", 200, distance=FARTHER), row("adaptive", 400), row("adaptive", 700)],
        "adaptive, in part": [row("adaptive", 100)],
    }
    lines = verdict_lines(rows)
    assert [line[0] for line in lines] == ["standard"] * 3 + ["high"] * 3, "draft is not equal"
    assert [line[2] for line in lines] == ["13.3%", "50.0%", "66.7%", "23.3%", "87.5%", "116.7%"]
    assert "look_ahead" in lines[0][1], "the better of the paper's two"
    assert verdict_lines(rows | {"uniform": []}) == []


class Seen:
    """A bench that finds the pictures of samplers of at least 600 patch evaluations as good as any."""

    def cheapest_as_good(self, rows: list[Row], as_this: Row) -> tuple[Row, dict[str, Interval]] | None:
        able = [row for row in rows if row.patch_evaluations >= 600]
        return (able[0], EQUAL) if able else None


def test_presets_are_compared_with_uniform_samplers_of_the_same_quality() -> None:
    presets = [row("adaptive", 150), row("adaptive", 300), row("adaptive", 600)]
    bench: Any = Seen()
    uniform, interval = "uniform", "uniform, guidance interval"
    rows = {uniform: [row("euler", 400), row("euler", 600)], interval: [row("adaptive", 500)], "adaptive": presets}
    lines = as_good_lines(bench, rows)
    assert [line[:2] for line in lines] == [[each, of] for each in PRESETS for of in (uniform, interval)]
    assert [line[-2:] for line in lines[::2]] == [["25.0%", "25.0%"], ["50.0%", "50.0%"], ["100.0%", "100.0%"]]
    assert {line[2] for line in lines[1::2]} == {"none"}
    assert as_good_lines(bench, rows | {uniform: [], interval: []}) == [], "no lines without uniform samplers"


def test_the_cheapest_as_good_is_no_worse_in_any_figure() -> None:
    bench = SamplerBench.__new__(SamplerBench)
    bench.gallery = Pairs()  # type: ignore[assignment]
    rows = [row(name, cost) for name, cost in (("far", 1), ("blurred", 2), ("good", 4), ("dear", 5), ("ours", 3))]
    bench.seen = {f"{each.sampler} steps=4": each.sampler for each in rows}  # type: ignore[misc]
    best = bench.cheapest_as_good(rows[:-1], rows[-1])
    assert best is not None
    assert best[0].sampler == "good"
    assert bench.cheapest_as_good(rows[:2], rows[-1]) is None


class Pairs:
    """A gallery that knows how samplers compare by their names."""

    def differences(self, made: str, other: str) -> dict[str, Interval]:
        assert other == "ours"
        return EQUAL | {"far": {"distance": FARTHER}, "blurred": {"sharpness": BLURRED}}.get(made, {})


def test_leaps_are_measured_with_the_presets_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(leap, "measure_leaps", lambda *arguments: asked.append(arguments) or [])
    pipeline = Pipeline.open("emoji-text")
    bench: Any = SimpleNamespace(conditions=[], seeds=[], guidance=3.0)
    assert leap_lines(bench, pipeline) == []
    draft, standard, high = [served for *_, served in asked]
    assert standard == pipeline.default_sampler(small_until=0.0), "leaps at full size, from every time"
    assert draft.steps < standard.steps < high.steps
    assert draft.guidance_until == high.guidance_until == standard.guidance_until < 1

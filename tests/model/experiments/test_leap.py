"""Measuring the predicted error of a leap: on paths with known leaps, and on a real network."""

from __future__ import annotations

import pytest
import torch

from patchforge.model.experiments.leap import measure_leaps, summarise_leap
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Adaptive


def test_ratios_and_ranks_are_those_of_what_was_predicted() -> None:
    bend = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    variance = 4 * bend
    leap = summarise_leap(4, 0.5, bend, variance, 3 * bend)
    assert leap.by_bend.value == pytest.approx(3)
    assert leap.by_variance.value == pytest.approx(0.75)
    assert leap.by_both.value == pytest.approx(1.5)
    assert leap.by_both.low <= 1.5 <= leap.by_both.high
    assert leap.rank.value == pytest.approx(1)
    assert summarise_leap(4, 0.5, bend, variance, 1 / bend).rank.value == pytest.approx(-1)


@pytest.mark.parametrize(("order", "times"), [(1, [0.2, 0.4, 0.6]), (2, [0.4, 0.6])])
def test_every_step_from_which_a_bend_is_known_is_measured(
    pipelines: dict[str, Pipeline], order: int, times: list[float]
) -> None:
    pipeline = pipelines["tiny-class"]
    served = Adaptive(pipeline.grid, 5, 2.0, order=order)
    leaps = measure_leaps(pipeline, [pipeline.condition_on("cat")] * 3, range(3), served)
    assert [each.time for each in leaps] == pytest.approx(times)
    assert all(each.measured > 0 for each in leaps)

"""Calibration, measured on true variances and on a network with a known error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchforge.model.evaluation.calibration import measure_calibration, spearman, spearman_interval, summarise
from patchforge.model.pipeline import Pipeline
from tests.model.shapes import shapes


def test_rank_correlation() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    b = torch.tensor([[10.0, 20.0, 30.0, 99.0], [2.0, 1.0, 4.0, 3.0]])
    torch.testing.assert_close(spearman(a, b), torch.tensor([1.0, 0.6], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4000, generator=generator)
    interval = spearman_interval(x, x + noise, torch.arange(4000))
    assert interval.low < float(spearman(x, x + noise)) < interval.high
    assert interval.high - interval.low < 0.06


def test_a_true_variance_is_found_true_and_a_quarter_of_it_not() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(200, 64, generator=generator)
    variance = torch.rand(200, 64, generator=generator) + 0.1
    measured = (variance[..., None] * torch.randn(200, 64, 16, generator=generator).square()).mean(-1)
    pictures = torch.arange(100).repeat(2)
    true = summarise(times, variance, measured, pictures)
    assert len(true.times) == 10
    assert all(row.spearman.value > 0.5 for row in true.times)
    assert all(each.measured.value == pytest.approx(each.predicted, rel=0.1) for each in true.reliability)
    wrong = summarise(times, variance / 4, measured, pictures)
    assert all(each.measured.value == pytest.approx(4 * each.predicted, rel=0.1) for each in wrong.reliability)
    told = summarise(times, torch.rand(200, 64, generator=generator), measured, pictures)
    assert all(abs(row.spearman.value) < 0.1 for row in told.times)


def test_errors_are_measured_where_the_network_was_asked(pipelines: dict[str, Pipeline]) -> None:
    """A network that predicts zero has the whole velocity as its error: |x1 − x0|² per value."""
    pipeline = pipelines["tiny-class"]
    table = shapes()
    few = table.where(table.held_out())
    blank = {name: torch.zeros_like(each) for name, each in pipeline.network.state_dict().items()}
    before = {name: each.clone() for name, each in pipeline.network.state_dict().items()}
    try:
        pipeline.network.load_state_dict(blank)
        figures = measure_calibration(pipeline, few)["uniform"]
    finally:
        pipeline.network.load_state_dict(before)
    clean = pipeline.codec.encode(torch.from_numpy(few.images))
    expected = 1 + float(clean.square().mean())
    measured = np.mean([each.measured.value for each in figures.reliability])
    assert measured == pytest.approx(expected, rel=0.1)
    assert figures.reliability[0].predicted == pytest.approx(1)  # log-variance 0

"""Muon, and the moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from patchforge.model.training.optimiser import MovingAverage, Muon, orthogonalise, split_parameters
from patchforge.model.training.run import Size, build


def test_a_long_matrix_is_orthogonalised_as_a_square_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long matrices use their Gram matrix. Two thirds of the directions are nearly missing, as in a gradient."""
    monkeypatch.setattr("patchforge.model.training.optimiser.has_fast_bf16", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    left, right, rest = (torch.randn(*shape, generator=generator) for shape in ((96, 30), (30, 300), (96, 300)))
    matrix = left @ right + 0.02 * rest
    exact = (matrix / matrix.norm()).double()
    for _ in range(5):
        gram = exact @ exact.T
        exact = 3.4445 * exact + (-4.7750 * gram + 2.0315 * gram @ gram) @ exact
    both = orthogonalise(torch.stack([matrix, 2 * matrix])).double()
    torch.testing.assert_close(both, torch.stack([exact, exact]), atol=1e-4, rtol=0)
    torch.testing.assert_close(orthogonalise(matrix.T[None]).double(), exact.T[None], atol=1e-4, rtol=0)


def test_muon_orthogonalises_and_lowers_a_loss() -> None:
    matrix = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    weight = torch.nn.Parameter(torch.zeros(12, 12))
    target, muon = torch.eye(12), Muon([weight], lr=0.02)
    for _ in range(60):
        loss = (weight - target).square().sum()
        loss.backward()
        muon.step()
        muon.zero_grad()
    assert loss < 1.0


def test_matrices_of_the_blocks_go_to_muon_and_nothing_is_left_out() -> None:
    for kind in ("class", "text"):
        network = build(kind, 4, 8, 2, Size(width=64, depth=2))
        matrices, rest = split_parameters(network)
        assert len(matrices) + len(rest) == len(list(network.parameters()))
        assert {parameter.ndim for parameter in matrices} == {2}


def test_the_moving_average_forgets_its_start() -> None:
    layer = torch.nn.Linear(2, 2)
    average = MovingAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    for step in range(80):
        average.update(layer, step)
    assert average.values["weight"] == pytest.approx(torch.full((2, 2), 3.0), abs=1e-2)

"""Distances between sets of features agree with closed-form results."""

from __future__ import annotations

import pytest
import torch

from patchforge.model.errors import DataError
from patchforge.model.evaluation.frechet import (
    Gaussian,
    bootstrap,
    frechet_difference,
    frechet_distance,
    frechet_interval,
    mean_interval,
    precision_recall,
)


def cloud(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_the_distance_of_two_known_gaussians() -> None:
    deviations, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, -1.0])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3))).Q
    a = cloud(400_000, 3, seed=1)
    b = cloud(400_000, 3, seed=2) * deviations + shift
    expected = float(((1 - deviations) ** 2).sum() + (shift**2).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.01)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=0.01)  # for any axes
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-6)


def test_covariances_that_do_not_commute_agree_with_an_iterated_square_root() -> None:
    a, b = cloud(300, seed=1).double(), cloud(300, seed=2).double() @ cloud(6, seed=3).double()
    one, other = torch.cov(a.T), torch.cov(b.T)
    root, inverse = one @ other, torch.eye(6, dtype=torch.float64)
    for _ in range(60):  # Denman and Beavers, 1976
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    expected = float((a.mean(0) - b.mean(0)).square().sum() + (one + other - 2 * root).trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_nothing_is_at_no_distance_from_itself_also_with_fewer_vectors_than_dimensions() -> None:
    for count in (4, 200):
        features = cloud(count)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_weights_count_as_repetitions() -> None:
    features = cloud(50)
    weights = torch.ones(50)
    weights[:10] = 3
    repeated = torch.cat([features, features[:10], features[:10]])
    weighted, plain = Gaussian.of(features, weights), Gaussian.of(repeated)
    torch.testing.assert_close(weighted.mean, plain.mean)
    # The two differ by the divisor of an unbiased estimate.
    torch.testing.assert_close(weighted.covariance, plain.covariance, rtol=0.05, atol=0)


def test_intervals_hold_the_figure_and_shrink_with_pictures() -> None:
    reference = Gaussian.of(cloud(20_000, seed=9))
    widths = []
    for count in (200, 3200):
        interval = frechet_interval(reference, cloud(count) + 0.5)
        assert interval.low < interval.value < interval.high
        assert interval.value == pytest.approx(frechet_distance(reference, cloud(count) + 0.5))
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0] / 2


def test_paired_rows_tell_apart_what_unpaired_ones_cannot() -> None:
    reference = Gaussian.of(cloud(20_000, seed=9))
    one = cloud(300) + 0.3
    other = one + 0.03
    difference = frechet_difference(reference, other, one)
    assert difference.low > 0
    alone = frechet_interval(reference, one)
    assert difference.high - difference.low < (alone.high - alone.low) / 2
    with pytest.raises(ValueError, match="cannot form pairs"):
        frechet_difference(reference, one, one[:10])


def test_a_bootstrap_of_a_mean_has_the_width_theory_says() -> None:
    values = cloud(1000, 1)[:, 0]
    interval = bootstrap(lambda rows: float(values[rows].mean()), 1000, resamples=400)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 1000**0.5, rel=0.2)


def test_members_of_a_group_are_not_independent() -> None:
    hits = (cloud(300, 1)[:, 0] > 0).float()
    alone = mean_interval(hits)
    grouped = mean_interval(hits.repeat_interleave(10), torch.arange(300).repeat_interleave(10))
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert mean_interval(hits.repeat(10)).high - mean_interval(hits.repeat(10)).low < (alone.high - alone.low) / 2


def test_precision_sees_what_is_made_up_and_recall_what_is_missing() -> None:
    real = torch.cat([cloud(300, seed=1), cloud(300, seed=2) + 20])  # two kinds
    half = cloud(600, seed=3)  # one of them
    figures = precision_recall(real, half)
    assert figures["precision"].value > 0.85
    assert figures["recall"].value == pytest.approx(0.5, abs=0.1)
    made_up = torch.cat([half[:300], cloud(300, seed=4) - 20])
    assert precision_recall(real, made_up)["precision"].value == pytest.approx(0.5, abs=0.1)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(cloud(1), cloud(10))
    with pytest.raises(DataError, match="more than 3"):
        precision_recall(cloud(3), cloud(10))

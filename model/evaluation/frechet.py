"""Compare sets of pictures by their feature vectors: Fréchet distance, precision and recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchforge.model.errors import DataError

NEIGHBOURS = 3
"""Neighbours for precision and recall, as in Kynkäänniemi et al., 2019."""
RESAMPLES = 200
PORTION = 2048
"""Pictures whose distances to all others are in memory at once."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def rounded(self, digits: int = 4) -> dict[str, float]:
        """The figure for JSON."""
        return {name: round(value, digits) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Gaussian:
    """Mean `(d,)`, covariance `(d, d)` and its square root, of a set of feature vectors, in float64."""

    mean: Tensor
    covariance: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> Gaussian:
        """Fit to `features` `(n, d)`. `weights` `(n,)` say how much each vector counts.

        Raises:
            DataError: there are fewer than two vectors.
        """
        mean, covariance = _moments(features, weights)
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return cls(mean, covariance, root)


def frechet_distance(a: Tensor | Gaussian, b: Tensor | Gaussian) -> float:
    """Fréchet distance, `|μa − μb|² + tr(Ca + Cb − 2 (Ca½ Cb Ca½)½)`, of features `(n, d)` or Gaussians.

    It falls as the number of vectors grows, so compare only distances of equal numbers.

    Raises:
        DataError: there are fewer than two vectors.
    """
    one = a if isinstance(a, Gaussian) else Gaussian.of(a)
    if isinstance(b, Tensor):
        return _distance_of_rows(one, b)(torch.arange(len(b)))
    return _distance(one, b.mean, b.covariance)


def _distance(reference: Gaussian, mean: Tensor, covariance: Tensor) -> float:
    overlap = torch.linalg.eigvalsh(reference.root @ covariance @ reference.root).clamp(min=0).sqrt().sum()
    apart = (reference.mean - mean).square().sum()
    return float(apart + reference.covariance.trace() + covariance.trace() - 2 * overlap)


def _distance_of_rows(reference: Gaussian, features: Tensor) -> Callable[[Tensor], float]:
    """Make a function from rows of `features` `(n, d)` to their distance; rows may repeat.

    Of fewer vectors than dimensions it takes the eigenvalues of an n × n matrix, which are the same but for zeros.
    """
    if len(features) >= features.shape[1]:
        return lambda rows: _distance(reference, *_moments(features[rows], None))
    apart = features.double() - reference.mean
    kernel = apart @ reference.covariance @ apart.T
    squares, size = apart.square().sum(dim=1), reference.covariance.trace()

    def distance(rows: Tensor) -> float:
        count = len(rows)
        if count < 2:
            raise DataError("a Fréchet distance needs at least two pictures in each set")
        mean = apart[rows].mean(dim=0).square().sum()
        spread = (squares[rows].sum() - count * mean) / (count - 1)
        some = kernel[rows][:, rows]
        centred = some - some.mean(dim=0) - some.mean(dim=1, keepdim=True) + some.mean()
        overlap = torch.linalg.eigvalsh(centred / (count - 1)).clamp(min=0).sqrt().sum()
        return float(mean + size + spread - 2 * overlap)

    return distance


def frechet_interval(reference: Gaussian, features: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """`frechet_distance` with a bootstrap over `features` `(n, d)`. The reference counts as exact."""
    return bootstrap(_distance_of_rows(reference, features), len(features), resamples, seed)


def frechet_difference(
    reference: Gaussian, a: Tensor, b: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Distance of `a` − distance of `b`, `(n, d)` each. Rows are pairs with the same condition and noise.

    Raises:
        ValueError: `a` and `b` differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} vectors cannot form pairs")

    ours, theirs = _distance_of_rows(reference, a), _distance_of_rows(reference, b)
    return bootstrap(lambda rows: ours(rows) - theirs(rows), len(a), resamples, seed)


def bootstrap(figure: Callable[[Tensor], float], count: int, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Compute `figure` of all rows, with a 95 % interval from resamples of the rows.

    The interval is centred on the figure itself. Resampling repeats rows, which shifts a Fréchet distance upwards, and
    this shift is not uncertainty.
    """
    generator = torch.Generator().manual_seed(seed)
    value = figure(torch.arange(count))
    draws = np.array([figure(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)])
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return Interval(value, value + float(low), value + float(high))


def precision_recall(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS, seed: int = 0) -> dict[str, Interval]:
    """Precision (share of `made` `(n, d)` among `real`) and recall (share of `real` `(m, d)` among `made`).

    A picture is among others if it is at least as near to one of them as that one's `neighbours`-th neighbour. Use
    equal numbers of both. The intervals are bootstraps over the pictures counted.

    Raises:
        DataError: there are too few pictures.
    """
    return {name: mean_interval(each, seed=seed) for name, each in neighbourhood_hits(real, made, neighbours).items()}


def neighbourhood_hits(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, Tensor]:
    """Which pictures `precision_recall` counts: `precision` `(n,)` of `made`, and `recall` `(m,)` of `real`.

    Raises:
        DataError: there are too few pictures.
    """
    if min(len(real), len(made)) <= neighbours:
        raise DataError(f"precision and recall need more than {neighbours} pictures of each kind")
    hits = {"precision": _covered(made, real, neighbours), "recall": _covered(real, made, neighbours)}
    return {name: each.float() for name, each in hits.items()}


def mean_interval(values: Tensor, groups: Tensor | None = None, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of `values` `(n,)`. The bootstrap draws whole `groups` `(n,)`: values of a group depend on each other."""
    values = values.double()
    index = torch.arange(len(values)) if groups is None else torch.unique(groups, return_inverse=True)[1]
    size = int(index.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)
    counts = torch.bincount(index, minlength=size).double()
    draws = torch.randint(size, (resamples, size), generator=torch.Generator().manual_seed(seed))
    low, high = np.percentile((sums[draws].sum(dim=1) / counts[draws].sum(dim=1)).numpy(), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def _covered(points: Tensor, others: Tensor, neighbours: int) -> Tensor:
    # In portions: all distances between 50,000 pictures take 10 GB. The nearest neighbour is the point itself.
    near = [torch.cdist(part, others).kthvalue(neighbours + 1, dim=1).values for part in others.split(PORTION)]
    radius = torch.cat(near)
    return torch.cat([(torch.cdist(part, others) <= radius).any(dim=1) for part in points.split(PORTION)])


def _moments(features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise DataError("a Fréchet distance needs at least two pictures in each set")
    features = features.double()
    share = torch.ones(len(features), dtype=torch.float64) if weights is None else weights.double()
    return share @ features / share.sum(), torch.cov(features.T, aweights=share)

"""Distances between sets of pictures, as clouds of feature vectors: Fréchet distance, precision and recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.errors import DataError

NEIGHBOURS = 3
"""Of precision and recall, as in Kynkäänniemi et al., 2019."""
RESAMPLES = 200


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def rounded(self, digits: int = 4) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, digits) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Gaussian:
    """Mean ``(d,)`` and covariance ``(d, d)`` of a cloud, in float64, with the covariance's square root."""

    mean: Tensor
    covariance: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> Gaussian:
        """Of ``features`` ``(n, d)``; ``weights`` ``(n,)`` say how often each counts.

        Raises:
            DataError: there are fewer than two vectors.
        """
        mean, covariance = _moments(features, weights)
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return cls(mean, covariance, root)


def frechet_distance(a: Tensor | Gaussian, b: Tensor | Gaussian) -> float:
    """``|μa − μb|² + tr(Ca + Cb − 2 (Ca½ Cb Ca½)½)`` of features ``(n, d)`` or of what `Gaussian.of` made of them.

    It falls with the number of vectors, so only compare distances of equally many.
    """
    one = a if isinstance(a, Gaussian) else Gaussian.of(a)
    mean, covariance = (b.mean, b.covariance) if isinstance(b, Gaussian) else _moments(b, None)
    overlap = torch.linalg.eigvalsh(one.root @ covariance @ one.root).clamp(min=0).sqrt().sum()
    apart = (one.mean - mean).square().sum()
    return float(apart + one.covariance.trace() + covariance.trace() - 2 * overlap)


def frechet_interval(reference: Gaussian, features: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """`frechet_distance` with a bootstrap over ``features`` ``(n, d)``; the reference counts as known."""
    return bootstrap(lambda rows: frechet_distance(reference, features[rows]), len(features), resamples, seed)


def frechet_difference(
    reference: Gaussian, a: Tensor, b: Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Distance of ``a`` less that of ``b``, ``(n, d)`` each, whose rows are paired: same condition, same noise."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} vectors are no pairs")

    def difference(rows: Tensor) -> float:
        return frechet_distance(reference, a[rows]) - frechet_distance(reference, b[rows])

    return bootstrap(difference, len(a), resamples, seed)


def bootstrap(figure: Callable[[Tensor], float], count: int, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """``figure`` of all rows, and the spread of it over resamples of the rows, 95 % of them.

    The spread is laid about the figure itself: resampling repeats rows, which shifts a Fréchet distance upwards, and
    that shift is no uncertainty.
    """
    generator = torch.Generator().manual_seed(seed)
    value = figure(torch.arange(count))
    draws = np.array([figure(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)])
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5])
    return Interval(value, value + float(low), value + float(high))


def precision_recall(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS, seed: int = 0) -> dict[str, Interval]:
    """Share of ``made`` ``(n, d)`` among the real ones, and of ``real`` ``(m, d)`` among the made.

    A picture is among others if it is as near to one of them as that one's ``neighbours``-th neighbour is. Give
    equally many of both. The intervals are bootstraps over the pictures counted.
    """
    if min(len(real), len(made)) <= neighbours:
        raise DataError(f"precision and recall need more than {neighbours} pictures of each kind")
    found = {"precision": _covered(made, real, neighbours), "recall": _covered(real, made, neighbours)}
    return {name: mean_interval(hits, seed=seed) for name, hits in found.items()}


def mean_interval(values: Tensor, groups: Tensor | None = None, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of ``values`` ``(n,)``; the bootstrap draws whole ``groups`` ``(n,)``, whose members are not independent."""
    values = values.double()
    index = torch.arange(len(values)) if groups is None else torch.unique(groups, return_inverse=True)[1]
    size = int(index.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)
    counts = torch.bincount(index, minlength=size).double()
    draws = torch.randint(size, (resamples, size), generator=torch.Generator().manual_seed(seed))
    low, high = np.percentile((sums[draws].sum(dim=1) / counts[draws].sum(dim=1)).numpy(), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def _covered(points: Tensor, others: Tensor, neighbours: int) -> Tensor:
    radius = torch.cdist(others, others).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself
    return (torch.cdist(points, others) <= radius).any(dim=1)


def _moments(features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise DataError("a Fréchet distance needs at least two pictures on each side")
    features = features.double()
    share = torch.ones(len(features), dtype=torch.float64) if weights is None else weights.double()
    return share @ features / share.sum(), torch.cov(features.T, aweights=share)

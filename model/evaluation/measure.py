"""A figure of a model together with its bounds, and how often the right candidate is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchforge.model.evaluation.frechet import Interval, mean_interval


@dataclass(frozen=True)
class Measure:
    """A figure of the generated pictures, and the same figure of flawless pictures."""

    made: Interval
    reconstructed: Interval | None = None
    """The figure of real pictures after the autoencoder."""
    real: Interval | None = None
    """The figure of real pictures: the highest accuracy or lowest distance to expect."""
    chance: float | None = None
    """The figure of a model that ignores the prompt."""

    @classmethod
    def of(cls, figures: dict[str, Interval], chance: float | None = None) -> Measure:
        """Make a measure from the entries `made` and, if present, `reconstructed` and `real`."""
        return cls(figures["made"], figures.get("reconstructed"), figures.get("real"), chance)

    def figures(self) -> dict[str, Any]:
        """The figures for JSON, without those that are None."""
        found = {name: each.rounded() for name, each in vars(self).items() if isinstance(each, Interval)}
        return found if self.chance is None else found | {"chance": round(self.chance, 4)}


def rank_of_own(distances: Tensor, own: Tensor) -> Tensor:
    """Count the candidates that are at least as close as the right one: `(n, m)` and index `(n,)` → `(n,)`.

    A tie counts as a miss: real pictures repeat (a blank button has many names) and must not count as found.
    """
    mine = distances.gather(1, own[:, None])
    return (distances <= mine).sum(dim=1) - 1


@dataclass(frozen=True)
class Ranks:
    """Rank of the right candidate, `(n,)` from 0 for the best, and the n concepts that it shows."""

    ranks: Tensor
    concepts: list[str]

    @classmethod
    def of(cls, distances: Tensor, own: Tensor, concepts: list[str]) -> Ranks:
        """Rank by `distances` `(n, m)` to m candidates. `own` `(n,)` is the index of the right one."""
        return cls(rank_of_own(distances, own), concepts)

    @classmethod
    def join(cls, parts: list[Ranks]) -> Ranks:
        """Join several sets of ranks."""
        return cls(torch.cat([each.ranks for each in parts]), [name for each in parts for name in each.concepts])

    def share(self, top: int) -> Interval:
        """Share of ranks below `top`. The bootstrap draws concepts: pictures of a concept depend on each other."""
        return mean_interval((self.ranks < top).float(), group_of(self.concepts))


def measure_top(
    name: str, ranks: dict[str, Ranks], candidates: list[tuple[int, int]], tops: tuple[int, ...] = (1, 5)
) -> dict[str, Measure]:
    """Measures `{name}_top1` and so on, from the ranks `made` and, if present, `reconstructed` and `real`.

    `candidates` lists how many there are to choose from, and how many questions have so many.
    """
    asked = sum(questions for _, questions in candidates)
    measures = {}
    for top in tops:
        chance = sum(questions * min(1.0, top / count) for count, questions in candidates) / asked
        measures[f"{name}_top{top}"] = Measure.of({of: each.share(top) for of, each in ranks.items()}, chance=chance)
    return measures


def group_of(names: list[str]) -> Tensor:
    """Number the names: `(n,)` long, equal numbers for equal names."""
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([index[name] for name in names])

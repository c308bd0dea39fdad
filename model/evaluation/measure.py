"""One figure of a model beside its bounds, and how often the right one is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.evaluation.frechet import Interval, mean_interval


@dataclass(frozen=True)
class Measure:
    """A figure of the pictures made, and the same of pictures nothing is wrong with."""

    made: Interval
    reconstructed: Interval | None = None
    """Of real pictures through the autoencoder."""
    real: Interval | None = None
    """Of real pictures: a judge's ceiling, a distance's floor."""
    chance: float | None = None
    """Of a model that makes anything at all."""

    @classmethod
    def of(cls, figures: dict[str, Interval], chance: float | None = None) -> Measure:
        """From an entry ``made``, and maybe ``reconstructed`` and ``real``."""
        return cls(figures["made"], figures.get("reconstructed"), figures.get("real"), chance)

    def figures(self) -> dict[str, Any]:
        """For JSON; what is None is left out."""
        found = {name: each.rounded() for name, each in vars(self).items() if isinstance(each, Interval)}
        return found if self.chance is None else found | {"chance": round(self.chance, 4)}


def rank_of_own(distances: Tensor, own: Tensor) -> Tensor:
    """How many others lie as close as the own candidate or closer: ``(n, m)``, ``(n,)`` index → ``(n,)``.

    A tie counts against: real pictures repeat (a blank button has many names), and must not count as found.
    """
    mine = distances.gather(1, own[:, None])
    return (distances <= mine).sum(dim=1) - 1


@dataclass(frozen=True)
class Ranks:
    """Where the right one came, ``(n,)`` with 0 for the best, and what it shows, n names."""

    ranks: Tensor
    concepts: list[str]

    @classmethod
    def of(cls, distances: Tensor, own: Tensor, concepts: list[str]) -> Ranks:
        """Of ``distances`` ``(n, m)`` to m candidates, of which ``own`` ``(n,)`` is right."""
        return cls(rank_of_own(distances, own), concepts)

    @classmethod
    def join(cls, parts: list[Ranks]) -> Ranks:
        """All in one."""
        return cls(torch.cat([each.ranks for each in parts]), [name for each in parts for name in each.concepts])

    def share(self, top: int) -> Interval:
        """How often it is among the first ``top``; the bootstrap draws concepts, whose pictures are not independent."""
        return mean_interval((self.ranks < top).float(), group_of(self.concepts))


def found(name: str, ranks: dict[str, Ranks], candidates: int, tops: tuple[int, ...] = (1, 5)) -> dict[str, Measure]:
    """Measures ``{name}_top1`` and so on; ``ranks`` has an entry ``made``, and maybe ``reconstructed`` and ``real``."""
    return {
        f"{name}_top{top}": Measure.of(
            {of: each.share(top) for of, each in ranks.items()}, chance=min(1.0, top / candidates)
        )
        for top in tops
    }


def group_of(names: list[str]) -> Tensor:
    """``(n,)`` long: equal where the names are."""
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([index[name] for name in names])

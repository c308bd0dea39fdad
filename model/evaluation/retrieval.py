"""Does a picture show what was asked for? Ranks the real pictures of the prompt among those of other prompts.

Pictures are compared by their colours at 8×8 and 16×16 pixels: crude, but it needs no trained judge, so it cannot
flatter a model trained beside one. It sees layout and colour, not identity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.manifest import ClassNetwork
from model.pipeline import Pipeline
from model.training.data import Pictures
from model.training.run import prompt_of

CANDIDATES = 100
RESAMPLES = 1000


@dataclass(frozen=True)
class Retrieval:
    """How often the right one of ``candidates`` comes first, or among the first five; 95 % intervals."""

    pictures: int
    candidates: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    chance_top1: float
    chance_top5: float

    def figures(self) -> dict[str, object]:
        """For ``bundle.json`` and tables."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def layout_features(images: Tensor) -> Tensor:
    """``(n, height, width, 3)`` uint8 → ``(n, 960)``: colours at two resolutions, weighted alike."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return torch.cat([F.adaptive_avg_pool2d(pixels, side).flatten(1) / side for side in (8, 16)], dim=1)


def ranks_to_figures(ranks: np.ndarray, candidates: int, groups: np.ndarray, seed: int = 0) -> Retrieval:
    """Summarise ranks ``(n,)`` (0 is best).

    Intervals come from a bootstrap over ``groups`` ``(n,)``: pictures of one concept are not independent.
    """
    random = np.random.default_rng(seed)
    hits = np.stack([ranks < 1, ranks < 5]).astype(float)
    _, index = np.unique(groups, return_inverse=True)
    counts = np.bincount(index)
    sums = np.stack([np.bincount(index, weights=row) for row in hits])
    draws = random.integers(0, len(counts), size=(RESAMPLES, len(counts)))
    means = sums[:, draws].sum(axis=-1) / counts[draws].sum(axis=-1)
    low, high = np.percentile(means, [2.5, 97.5], axis=-1).round(4)
    return Retrieval(
        pictures=len(ranks),
        candidates=candidates,
        top1=round(float(hits[0].mean()), 4),
        top1_interval=(float(low[0]), float(high[0])),
        top5=round(float(hits[1].mean()), 4),
        top5_interval=(float(low[1]), float(high[1])),
        chance_top1=round(1 / candidates, 4),
        chance_top5=round(min(1, 5 / candidates), 4),
    )


def rank_of_own(distances: Tensor, own: Tensor) -> np.ndarray:
    """How many others lie as close as the own candidate or closer: ``(n, m)``, ``(n,)`` index → ``(n,)``.

    A tie counts against: real pictures repeat (a blank button has many names), and must not count as found.
    """
    mine = distances.gather(1, own[:, None])
    return ((distances <= mine).sum(dim=1) - 1).numpy()


def evaluate_prompts(pipeline: Pipeline, pictures: Pictures, seed: int = 0, rounds: int = 3) -> Retrieval:
    """Per round, prompts of up to 100 pictures of one style: where does each one's real picture rank among them?"""
    random = np.random.default_rng(seed)
    styles = sorted(set(pictures.styles))
    ranks, concepts, sizes = [], [], []
    for number in range(rounds):
        of_style = np.array([style == styles[number % len(styles)] for style in pictures.styles])
        _, firsts = np.unique(np.array(pictures.concepts)[of_style], return_index=True)  # one picture a concept
        rows = np.flatnonzero(of_style)[random.permutation(firsts)[:CANDIDATES]]
        made = _generate(pipeline, [prompt_of(pictures, row) for row in rows], seed + 1000 * number)
        distances = torch.cdist(layout_features(made), layout_features(torch.from_numpy(pictures.images[rows])))
        ranks.append(rank_of_own(distances, torch.arange(len(rows))))
        concepts += [pictures.concepts[row] for row in rows]
        sizes.append(len(rows))
    return ranks_to_figures(np.concatenate(ranks), min(sizes), np.array(concepts))


def evaluate_classes(pipeline: Pipeline, pictures: Pictures, seed: int = 0, rounds: int = 3) -> Retrieval:
    """``rounds`` pictures of every class: where does it rank, by distance to its nearest real picture?

    Only classes with a picture in ``pictures`` take part.
    """
    present = sorted({pictures.class_names[label] for label in pictures.classes})
    wanted = present * rounds
    made = layout_features(_generate(pipeline, wanted, seed))
    real = layout_features(torch.from_numpy(pictures.images))
    index = torch.tensor([present.index(pictures.class_names[label]) for label in pictures.classes])
    distances = torch.cdist(made, real)
    nearest = torch.full((len(made), len(present)), torch.inf)
    nearest.scatter_reduce_(1, index.expand_as(distances), distances, "amin")
    own = torch.arange(len(present)).repeat(rounds)
    return ranks_to_figures(rank_of_own(nearest, own), len(present), np.array(wanted))


def evaluate(pipeline: Pipeline, pictures: Pictures, seed: int = 0, rounds: int = 3) -> Retrieval:
    """`evaluate_classes` or `evaluate_prompts`, as the model's kind demands."""
    run = evaluate_classes if isinstance(pipeline.manifest.network, ClassNetwork) else evaluate_prompts
    return run(pipeline, pictures, seed, rounds)


def _generate(pipeline: Pipeline, wanted: list[str], seed: int) -> Tensor:
    parts = []
    for start in range(0, len(wanted), 25):
        part = wanted[start : start + 25]
        conditions = [pipeline.condition_on(words) for words in part]
        seeds = list(range(seed + start, seed + start + len(part)))
        parts.append(pipeline.generate(pipeline.default_sampler(), conditions, seeds)[0])
    return torch.cat(parts)

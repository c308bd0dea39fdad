"""Make many pictures to measure, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchforge.model.denoiser import Condition
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler
from patchforge.model.storage.manifest import ClassNetwork
from patchforge.model.training.data import Pictures
from patchforge.model.training.progress import progress_bar
from patchforge.model.training.run import prompt_of
from patchforge.model.trajectory import Trajectory

BATCH = 32


@dataclass(frozen=True)
class Made:
    """Generated pictures `(n, height, width, 3)` uint8, and their cost."""

    pictures: Tensor
    patch_evaluations: float
    """Per picture, in all guidance branches."""
    saved: float
    """Patch evaluations saved, as a share of a dense run's."""


def make_pictures(
    pipeline: Pipeline,
    sampler: Sampler[Any],
    words: Sequence[str],
    seeds: Sequence[int],
    label: str = "pictures",
    budget: int | None = None,
) -> Made:
    """Make one picture for each pair of prompt (or class name) and seed. `budget` is as in `Pipeline.generate`."""
    parts, done, dense = [], 0, 0
    for made, runs in draw_pictures(pipeline, sampler, words, seeds, label, budget):
        parts.append(made)
        done += sum(run.patch_evaluations for run in runs)
        dense += sum(run.sampler.dense_patch_evaluations for run in runs)
    return Made(torch.cat(parts), done / len(words), 1 - done / dense)


def draw_pictures(
    pipeline: Pipeline,
    sampler: Sampler[Any],
    words: Sequence[str],
    seeds: Sequence[int],
    label: str = "pictures",
    budget: int | None = None,
) -> Iterator[tuple[Tensor, list[Trajectory]]]:
    """Do the same some at a time: yields pictures `(n, height, width, 3)` uint8, and what they took."""
    conditions: dict[str, Condition] = {}
    with progress_bar() as bar:
        for start in bar.track(range(0, len(words), BATCH), description=label):
            some = words[start : start + BATCH]
            for each in some:
                if each not in conditions:
                    conditions[each] = pipeline.condition_on(each)
            wanted, of = [conditions[each] for each in some], list(seeds[start : start + BATCH])
            yield pipeline.sample(sampler, wanted, of, budget=budget)


def words_for(pipeline: Pipeline, pictures: Pictures) -> list[str]:
    """The words that ask the model for each of `pictures`: its class name, or its first caption and style."""
    if isinstance(pipeline.manifest.network, ClassNetwork):
        return [pictures.class_names[label] for label in pictures.classes]
    return [prompt_of(pictures, row) for row in range(len(pictures))]


def reconstruct_pictures(pipeline: Pipeline, pictures: Pictures) -> Tensor:
    """Encode and decode the pictures, `(n, height, width, 3)` uint8. No model can be better than this."""
    codec = pipeline.codec
    return torch.cat([codec.decode(codec.encode(part)) for part in torch.from_numpy(pictures.images).split(64)])

"""Pictures made to be measured: many at a time, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.denoiser import Condition
from model.manifest import ClassNetwork
from model.pipeline import Pipeline
from model.samplers import Sampler
from model.training.data import Pictures
from model.training.progress import progress_bar
from model.training.run import prompt_of

BATCH = 32


@dataclass(frozen=True)
class Made:
    """Pictures ``(n, height, width, 3)`` uint8, and what each cost."""

    pictures: Tensor
    patch_evaluations: float
    """Per picture, guidance branches included."""
    saved: float
    """Share of a dense run's patch evaluations."""


def make_pictures(
    pipeline: Pipeline, sampler: Sampler[Any], words: Sequence[str], seeds: Sequence[int], label: str = "pictures"
) -> Made:
    """One picture a prompt or class name and seed."""
    conditions: dict[str, Condition] = {}
    parts, done, dense = [], 0, 0
    with progress_bar() as bar:
        for start in bar.track(range(0, len(words), BATCH), description=label):
            some = words[start : start + BATCH]
            for each in some:
                if each not in conditions:
                    conditions[each] = pipeline.condition_on(each)
            wanted, of = [conditions[each] for each in some], list(seeds[start : start + BATCH])
            made, runs = pipeline.generate(sampler, wanted, of)
            parts.append(made)
            done += sum(run.patch_evaluations for run in runs)
            dense += sum(run.sampler.dense_patch_evaluations for run in runs)
    return Made(torch.cat(parts), done / len(words), 1 - done / dense)


def words_for(pipeline: Pipeline, pictures: Pictures) -> list[str]:
    """What to ask the model for, to get each of ``pictures``: its class, or its first name and style."""
    if isinstance(pipeline.manifest.network, ClassNetwork):
        return [pictures.class_names[label] for label in pictures.classes]
    return [prompt_of(pictures, row) for row in range(len(pictures))]


def reconstructions(pipeline: Pipeline, pictures: Pictures) -> Tensor:
    """The pictures through the autoencoder and back, ``(n, height, width, 3)`` uint8: the best a model can do."""
    codec = pipeline.codec
    return torch.cat([codec.decode(codec.encode(part)) for part in torch.from_numpy(pictures.images).split(64)])

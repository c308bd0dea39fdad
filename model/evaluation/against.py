"""Compare a model's pictures with a file of real ones: what can be measured of any model, without its training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from patchforge.model.errors import DataError
from patchforge.model.evaluation.frechet import (
    NEIGHBOURS,
    Gaussian,
    Interval,
    frechet_interval,
    precision_recall,
)
from patchforge.model.evaluation.measure import Measure
from patchforge.model.evaluation.npz import read_npz, write_npz
from patchforge.model.evaluation.samples import draw_pictures
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler

PORTION = 64


class FeatureJudge(Protocol):
    """Whoever computes features of pictures."""

    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Compute features `(n, d)` of pictures `(n, height, width, 3)` uint8."""


@dataclass(frozen=True)
class Compared:
    """The measures of the pictures made, and what they took."""

    measures: dict[str, Measure]
    """Its bounds: `real` are as many pictures of the reference as were made, at most half of them, against the other
    half. `reconstructed` are as many pictures of the reference, from its beginning, as were made."""
    patch_evaluations: float
    """Per picture, in all guidance branches."""
    saved: float
    """Patch evaluations saved, as a share of a dense run's."""


def compare_features(real: Tensor, made: Tensor) -> dict[str, Interval]:
    """Compare features `(m, d)` of real pictures with `(n, d)` of others: Fréchet distance, precision, recall.

    Raises:
        DataError: there are too few pictures.
    """
    return {"frechet_distance": frechet_interval(Gaussian.of(real), made), **precision_recall(real, made)}


def file_features(judge: FeatureJudge, path: Path) -> Tensor:
    """Compute features `(n, d)` of all pictures of an `.npz`.

    Raises:
        DataError: the file is damaged, or has too few pictures.
    """
    return torch.cat(_enough(path, [judge.features(part) for part in read_npz(path, PORTION)]))


def measure_against(
    pipeline: Pipeline,
    judge: FeatureJudge,
    reference: Path,
    sampler: Sampler[Any],
    words: Sequence[str],
    seed: int = 0,
    npz: Path | None = None,
) -> Compared:
    """Draw a picture for each of `words`, and compare them with those of the file `reference`.

    Picture i has the seed `seed` + i. With `npz`, all are written there. Some are in memory at a time.

    Raises:
        DataError: the reference cannot be used: damaged, too small, or of another size than the model's pictures.
    """
    real, again = _look_at_reference(pipeline, judge, reference, len(words))
    features: list[Tensor] = []
    work = np.zeros(2)

    def draw() -> Iterator[np.ndarray]:
        for pictures, runs in draw_pictures(pipeline, sampler, words, range(seed, seed + len(words))):
            features.append(judge.features(pictures))
            work[:] += [sum(run.patch_evaluations for run in runs), sum(run.dense_patch_evaluations for run in runs)]
            yield pictures.numpy()

    if npz is not None:
        write_npz(npz, len(words), draw())
    else:
        for _ in draw():
            pass
    found = {"made": compare_features(real, torch.cat(features)), "reconstructed": compare_features(real, again)}
    if len(real) > 2 * (NEIGHBOURS + 1):
        half, other = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))].chunk(2)
        found["real"] = compare_features(half, other[: len(words)])  # a distance falls with the number of pictures
    names = found["made"]
    measures = {name: Measure.of({of: figures[name] for of, figures in found.items()}) for name in names}
    return Compared(measures, float(work[0] / len(words)), float(1 - work[0] / work[1]))


def _look_at_reference(pipeline: Pipeline, judge: FeatureJudge, reference: Path, count: int) -> tuple[Tensor, Tensor]:
    """Compute features of all pictures of the reference, and of `count` of them after the autoencoder."""
    width, height = pipeline.manifest.size
    real: list[Tensor] = []
    again: list[Tensor] = []
    for part in read_npz(reference, PORTION):
        if part.shape[1:3] != (height, width):
            found = f"{part.shape[2]}×{part.shape[1]}"
            raise DataError(
                f"{reference}: pictures of {found} pixels, but {pipeline.manifest.name} draws {width}×{height}"
            )
        real.append(judge.features(part))
        some = torch.from_numpy(part[: max(0, count - PORTION * len(again))])
        if len(some):
            again.append(judge.features(pipeline.codec.decode(pipeline.codec.encode(some))))
    return torch.cat(_enough(reference, real)), torch.cat(again)


def _enough(path: Path, parts: list[Tensor]) -> list[Tensor]:
    if sum(map(len, parts)) <= NEIGHBOURS:
        raise DataError(f"{path}: more than {NEIGHBOURS} pictures are needed")
    return parts

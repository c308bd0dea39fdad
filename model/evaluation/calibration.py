"""Measure whether the predicted uncertainty is right: each patch's predicted variance against its squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchforge.model.denoiser import Condition, Evaluation, Memory
from patchforge.model.evaluation.frechet import Interval, mean_interval
from patchforge.model.evaluation.samples import words_for
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.manifest import ClassNetwork
from patchforge.model.training.data import Pictures
from patchforge.model.training.loss import interpolate
from patchforge.model.training.progress import progress_bar
from patchforge.model.training.timesteps import LTG
from patchforge.model.types import Plan

TIMES = tuple(round(0.05 + 0.1 * index, 2) for index in range(10))
DRAWS = 4
"""LTG draws per picture."""
BINS = 10
BATCH = 32
RESAMPLES = 500
LEAST = 50
"""Fewest patches for which we report a correlation."""


@dataclass(frozen=True)
class AtTime:
    """How well the predicted variance ranks the errors, in one range of timesteps."""

    low: float
    high: float
    """The timesteps lie in `[low, high]`."""
    patches: int
    spearman: Interval
    """Rank correlation over all patches. It also holds for the error of the one-step estimate, which at one timestep is
    a multiple of the velocity's error."""
    within: Interval | None
    """Rank correlation over the patches of one picture, mean over pictures. Samplers choose patches by this order.
    None: no picture has enough patches."""


@dataclass(frozen=True)
class Bin:
    """A tenth of all patches, with similar predicted variance."""

    predicted: float
    """Mean predicted variance."""
    measured: Interval
    """Mean squared error of the velocity."""


@dataclass(frozen=True)
class Calibration:
    """The results for one way of drawing timesteps."""

    times: tuple[AtTime, ...]
    reliability: tuple[Bin, ...]

    def figures(self) -> dict[str, Any]:
        """The results for JSON."""
        return {
            "times": [
                {
                    "t": [round(each.low, 2), round(each.high, 2)],
                    "patches": each.patches,
                    "spearman": each.spearman.rounded(),
                    "within_picture": None if each.within is None else each.within.rounded(),
                }
                for each in self.times
            ],
            "reliability": [
                {"predicted": round(each.predicted, 4), "measured": each.measured.rounded()}
                for each in self.reliability
            ],
        }


def measure_calibration(pipeline: Pipeline, pictures: Pictures, seed: int = 0) -> dict[str, Calibration]:
    """Measure calibration on `pictures`, which the model must not have been trained on.

    Returns `uniform` (all patches of a picture at the same time, ten times each) and `ltg` (LTG timesteps, spec §2).
    """
    clean, conditions = _encode_pictures(pipeline, pictures)
    count, patches = clean.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    schedule = LTG(loc=0.7 if isinstance(pipeline.manifest.network, ClassNetwork) else 0.5)
    alike = torch.tensor(TIMES).repeat_interleave(count)[:, None].expand(-1, patches)
    drawn = schedule.sample(DRAWS * count, patches, generator)
    found = {}
    for name, times in (("uniform", alike), ("ltg", drawn)):
        rows = torch.arange(count).repeat(len(times) // count)
        predicted, measured = _measure_errors(pipeline, clean, conditions, rows, times, generator)
        found[name] = summarise(times, predicted, measured, rows)
    return found


def velocity_error(pipeline: Pipeline, pictures: Pictures, seed: int = 0) -> Tensor:
    """Squared error of the velocity per picture, `(n,)`: mean over patches, and over ten times for all patches."""
    clean, conditions = _encode_pictures(pipeline, pictures)
    count, patches = clean.shape[:2]
    times = torch.tensor(TIMES).repeat_interleave(count)[:, None].expand(-1, patches)
    rows = torch.arange(count).repeat(len(TIMES))
    _, measured = _measure_errors(pipeline, clean, conditions, rows, times, torch.Generator().manual_seed(seed))
    return measured.view(len(TIMES), count, patches).mean((0, 2))


def _encode_pictures(pipeline: Pipeline, pictures: Pictures) -> tuple[Tensor, list[Condition]]:
    """Encode the pictures to latents `(n, P, D)`, and prepare the conditions that ask for them."""
    encoded = [pipeline.codec.encode(part) for part in torch.from_numpy(pictures.images).split(64)]
    words = words_for(pipeline, pictures)
    known = {each: pipeline.condition_on(each) for each in dict.fromkeys(words)}
    return pipeline.grid.patchify(torch.cat(encoded)), [known[each] for each in words]


@torch.inference_mode()
def _measure_errors(
    pipeline: Pipeline,
    clean: Tensor,
    conditions: list[Condition],
    rows: Tensor,
    times: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Predicted variance and squared error of the velocity, `(n, P)` each, of `clean[rows]` at `times` `(n, P)`."""
    predicted, measured = [], []
    with progress_bar() as bar:
        for part in bar.track(torch.arange(len(rows)).split(BATCH), description="uncertainty"):
            target = clean[rows[part].to(clean.device)]
            noise = torch.randn(target.shape, generator=generator).to(target.device)
            noisy = interpolate(target, noise, times[part].to(target.device))
            evaluations = [
                Evaluation(_plan(latent, times[n]), conditions[rows[n]], Memory())
                for latent, n in zip(noisy, part.tolist(), strict=True)
            ]
            for i, prediction in enumerate(pipeline.denoiser.evaluate(evaluations)):
                predicted.append(prediction.difficulty.cpu())
                measured.append((target[i] - noise[i] - prediction.velocity).square().mean(dim=-1).cpu())
    return torch.stack(predicted), torch.stack(measured)


def _plan(latent: Tensor, times: Tensor) -> Plan:
    values, index = times.unique(return_inverse=True)
    return Plan(latent, tuple(values.tolist()), index.to(latent.device))


def summarise(times: Tensor, predicted: Tensor, measured: Tensor, pictures: Tensor) -> Calibration:
    """Compute the figures from `(n, P)` values. `pictures` `(n,)` is each row's picture; bootstraps are over these."""
    edges = torch.arange(0, 1.01, 0.1)
    rows = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = (times > low) & (times <= high)
        if int(inside.sum()) < LEAST:
            continue
        owners = pictures[:, None].expand_as(times)[inside]
        at = times[inside]
        pooled = spearman_interval(predicted[inside], measured[inside], owners)
        rows.append(
            AtTime(
                float(at.min()),
                float(at.max()),
                len(at),
                pooled,
                _correlate_within_pictures(predicted, measured, inside, pictures),
            )
        )
    order = predicted.flatten().argsort()
    owners = pictures[:, None].expand_as(times).flatten()
    bins = tuple(
        Bin(float(predicted.flatten()[part].mean()), mean_interval(measured.flatten()[part], owners[part]))
        for part in order.tensor_split(BINS)
    )
    return Calibration(tuple(rows), bins)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last dimension of `a` and `b`, `(…, n)` each."""
    a, b = (_centred_ranks(each) for each in (a, b))
    return (a * b).sum(dim=-1) / (a.square().sum(dim=-1) * b.square().sum(dim=-1)).sqrt()


def spearman_interval(a: Tensor, b: Tensor, groups: Tensor, seed: int = 0) -> Interval:
    """`spearman` of `a` and `b` `(n,)`, with a bootstrap over `groups` `(n,)`. Ranks are computed once, among all."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    index = torch.unique(groups, return_inverse=True)[1]
    size = int(index.max()) + 1
    terms = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y])
    sums = torch.zeros(6, size, dtype=torch.float64).index_add_(1, index, terms)
    draws = torch.randint(size, (RESAMPLES, size), generator=torch.Generator().manual_seed(seed))
    n, sx, sy, sxx, syy, sxy = sums[:, draws].sum(dim=-1)
    values = (sxy - sx * sy / n) / ((sxx - sx * sx / n) * (syy - sy * sy / n)).sqrt()
    low, high = np.percentile(values.numpy(), [2.5, 97.5])
    return Interval(float(spearman(a, b)), float(low), float(high))


def _centred_ranks(values: Tensor) -> Tensor:
    ranks = values.argsort(dim=-1).argsort(dim=-1).double()
    return ranks - ranks.mean(dim=-1, keepdim=True)


def _correlate_within_pictures(
    predicted: Tensor, measured: Tensor, inside: Tensor, pictures: Tensor
) -> Interval | None:
    """Mean of `spearman` over the rows that have at least eight patches inside."""
    values, owners = [], []
    for row in torch.nonzero(inside.sum(dim=1) >= 8)[:, 0].tolist():
        chosen = inside[row]
        values.append(spearman(predicted[row, chosen], measured[row, chosen]))
        owners.append(int(pictures[row]))
    if not values:
        return None
    return mean_interval(torch.stack(values), torch.tensor(owners))

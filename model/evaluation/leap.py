"""Is the error that `Adaptive` predicts of leaping to t = 1 the true one? What `CALIBRATION` was read off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.denoiser import Condition
from model.evaluation.calibration import spearman
from model.evaluation.frechet import Interval, bootstrap, mean_interval
from model.generate import Trajectory, run
from model.pipeline import Pipeline
from model.samplers import Sampler
from model.samplers.adaptive import Adaptive, AdaptiveState


@dataclass(frozen=True)
class Leap:
    """Of the patches of all pictures, had they leapt at ``time``."""

    steps: int
    """Of the run."""
    time: float
    measured: float
    """Root mean square distance of where they would have landed from where all steps led them."""
    by_both: Interval
    """Measured over predicted by the geometric mean of bend and uncertainty, mean over mean: `CALIBRATION`."""
    by_bend: Interval
    """Over predicted by the bend of the path alone."""
    by_variance: Interval
    """Over predicted by the network's own variance alone."""
    rank: Interval
    """Rank correlation of the geometric mean with what was measured, over the patches of a picture; the mean."""


def measure_leaps(
    pipeline: Pipeline, conditions: Sequence[Condition], seeds: Sequence[int], served: Adaptive
) -> list[Leap]:
    """One row a step from which a bend is known: of runs as ``served``, but no patch leaps or is left out."""
    sampler = replace(served, tolerance=0.0, skip_tolerance=0.0, exact=True)
    every: Sampler[Any] = sampler
    runs = [Trajectory.begin(every, c, pipeline.noise(s)) for c, s in zip(conditions, seeds, strict=True)]
    seen: list[tuple[float, Tensor, Tensor, Tensor]] = []

    def look(live: list[Trajectory]) -> None:
        states = [each.state for each in live if isinstance(each.state, AdaptiveState)]
        time = sampler.time(states[0].step - 1)
        if states[0].step > sampler.order:
            errors = [sampler.leap_errors(state, time) for state in states]
            bend, variance = (torch.stack(each).cpu() for each in zip(*errors, strict=True))
            seen.append((time, bend, variance, torch.stack([state.estimate for state in states])))

    run(pipeline.denoiser, runs, look)
    ends = torch.stack([each.state.x for each in runs])
    return [
        leap_of(sampler.steps, time, bend, variance, (landed - ends).square().mean(-1).sqrt().cpu())
        for time, bend, variance, landed in seen[:-1]  # from the last step there is nothing to leap over
    ]


def leap_of(steps: int, time: float, bend: Tensor, variance: Tensor, measured: Tensor) -> Leap:
    """From ``(n, P)`` each; intervals are bootstraps over pictures."""

    def over(predicted: Tensor) -> Interval:
        return bootstrap(lambda rows: float(measured[rows].mean() / predicted[rows].mean()), len(measured))

    both = (bend * variance).sqrt()
    return Leap(
        steps=steps,
        time=time,
        measured=float(measured.square().mean().sqrt()),
        by_both=over(both),
        by_bend=over(bend),
        by_variance=over(variance),
        rank=mean_interval(spearman(both, measured)),
    )

"""Compare the leap error that `Adaptive` predicts with the true error. `CALIBRATION` comes from this experiment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchforge.model.denoiser import Condition
from patchforge.model.evaluation.calibration import spearman
from patchforge.model.evaluation.frechet import Interval, bootstrap, mean_interval
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler
from patchforge.model.samplers.adaptive import Adaptive, AdaptiveState
from patchforge.model.trajectory import Trajectory, run


@dataclass(frozen=True)
class Leap:
    """The errors of all patches of all pictures, if they had leapt to t = 1 at `time`."""

    steps: int
    """Steps of the run."""
    time: float
    measured: float
    """Root mean square distance between the leap's end and the end of all steps."""
    by_both: Interval
    """Mean measured error ÷ mean predicted error, by the geometric mean of bend and variance: `CALIBRATION`."""
    by_bend: Interval
    """The same, predicted by the path's bend alone."""
    by_variance: Interval
    """The same, predicted by the network's variance alone."""
    rank: Interval
    """Rank correlation of predicted (geometric mean) and measured error within a picture; mean over pictures."""


def measure_leaps(
    pipeline: Pipeline, conditions: Sequence[Condition], seeds: Sequence[int], served: Adaptive
) -> list[Leap]:
    """Measure one row for each step at which a bend is known.

    The runs use the sampler `served`, but no patch leaps or is skipped.
    """
    sampler = replace(served, tolerance=0.0, skip_tolerance=0.0, exact=True)
    every: Sampler[Any] = sampler
    runs = [Trajectory.begin(every, c, pipeline.noise(s)) for c, s in zip(conditions, seeds, strict=True)]
    seen: list[tuple[float, Tensor, Tensor, Tensor]] = []

    def record_errors(live: list[Trajectory]) -> None:
        states = [each.state for each in live if isinstance(each.state, AdaptiveState)]
        time = sampler.time(states[0].step - 1)
        if states[0].step > sampler.order:
            errors = [sampler.leap_errors(state, time) for state in states]
            bend, variance = (torch.stack(each).cpu() for each in zip(*errors, strict=True))
            seen.append((time, bend, variance, torch.stack([state.estimate for state in states])))

    run(pipeline.denoiser, runs, record_errors)
    ends = torch.stack([each.state.x for each in runs])
    return [
        summarise_leap(sampler.steps, time, bend, variance, (landed - ends).square().mean(-1).sqrt().cpu())
        for time, bend, variance, landed in seen[:-1]  # after the last step there is nothing left to leap over
    ]


def summarise_leap(steps: int, time: float, bend: Tensor, variance: Tensor, measured: Tensor) -> Leap:
    """Compute a row from the errors `bend`, `variance` and `measured`, `(n, P)` each. Bootstraps over pictures."""

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

"""How many patches one evaluation should have: found by a short profile of each model when a worker starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog
import torch

from model.denoiser import Evaluation, Memory
from model.pipeline import Pipeline
from model.types import Plan

ENOUGH = 0.95
"""The budget is the largest pack that is quick enough and reaches this share of the best throughput of those: the packs
of real traffic, of plans of many kinds, profit more from being large than the profile's, whose pictures are alike."""
STEP_SECONDS = 0.1
"""A pack that takes longer is not quick enough, and no larger one is tried: requests join and leave between steps."""
MOST_PATCHES = 1 << 15
SECONDS = 2.0
"""Of profiling, for each model; the round it ends in is finished."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Measured:
    """One size of pack."""

    patches: int
    seconds: float
    """Of one evaluation, the best of a few."""

    @property
    def throughput(self) -> float:
        """Patches a second."""
        return self.patches / self.seconds


def patch_budget(pipeline: Pipeline) -> int:
    """Patches an evaluation of this model should have at most; logged."""
    measured = profile(pipeline)
    chosen = largest_good(measured)
    log.info(
        "patch budget",
        model=pipeline.manifest.name,
        patches=chosen,
        milliseconds={each.patches: round(1000 * each.seconds, 1) for each in measured},
    )
    return chosen


def largest_good(measured: list[Measured]) -> int:
    """Patches of the largest pack with `ENOUGH` of the best throughput among those that take no more than
    `STEP_SECONDS`; of the smallest pack if none does."""
    quick = [each for each in measured if each.seconds <= STEP_SECONDS] or measured[:1]
    best = max(each.throughput for each in quick)
    return max(each.patches for each in quick if each.throughput >= ENOUGH * best)


def profile(pipeline: Pipeline) -> list[Measured]:
    """Packs of 1, 2, 4 … guided pictures, each at its best of several rounds: what else runs here comes and goes."""
    words = pipeline.manifest.class_names[0] if pipeline.manifest.class_names else "picture"
    plan = Plan(pipeline.noise(0), (0.5,), guidance=2.0)
    one = Evaluation(plan, pipeline.condition_on(words), Memory())
    cost = pipeline.denoiser.patches(plan)
    pipeline.denoiser.evaluate([one])  # the first evaluation pays for what is set up once
    began, best = time.monotonic(), {1: _seconds(pipeline, [one])}
    while max(best) * cost <= MOST_PATCHES / 2 and best[max(best)] <= STEP_SECONDS:
        best[2 * max(best)] = _seconds(pipeline, [one] * 2 * max(best))
    while time.monotonic() - began < SECONDS:
        best = {pictures: min(seconds, _seconds(pipeline, [one] * pictures)) for pictures, seconds in best.items()}
    return [Measured(pictures * cost, seconds) for pictures, seconds in best.items()]


def _seconds(pipeline: Pipeline, evaluations: list[Evaluation]) -> float:
    began = time.perf_counter()
    pipeline.denoiser.evaluate(evaluations)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter() - began

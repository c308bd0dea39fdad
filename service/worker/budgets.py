"""Finds how many patches one evaluation should have: profiles each model for a short time when a worker starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from patchforge.model.denoiser import Evaluation, Memory
from patchforge.model.device import is_compiled, synchronize
from patchforge.model.flops import matmul_peak, patch_flops
from patchforge.model.parallel import crew
from patchforge.model.pipeline import Pipeline
from patchforge.model.types import Plan

ENOUGH = 0.95
"""The budget is the largest pack with this share of the best throughput, among packs that are fast enough. Real traffic
mixes many kinds of plans, and gains more from large packs than the profile, whose pictures are all alike."""
STEP_SECONDS = 0.1
"""A pack that takes longer is not fast enough, and no larger one is tried: requests join and leave between steps."""
MOST_PATCHES = 1 << 15
LARGE_GFLOP = 10.0
"""Work of a smaller pack is measured sooner than the device's peak."""
PEAK_SIDE = 1024
"""Of the matrices to measure the peak with."""
DOUBT = 2.0
"""How much a busy machine may have slowed down that measurement."""
SECONDS = 2.0
"""Time to profile one model. The last round is completed."""

Clock = Callable[[], float]

log = structlog.get_logger()


@dataclass(frozen=True)
class Measured:
    """One size of pack and its time."""

    patches: int
    seconds: float
    """The best time of a few evaluations."""

    @property
    def throughput(self) -> float:
        """Patches per second."""
        return self.patches / self.seconds


def patch_budget(pipeline: Pipeline, clock: Clock = time.perf_counter) -> int:
    """Finds the most patches that one evaluation of this model should have, and logs the profile.

    A network of which even one picture takes too long is not profiled: it gets the smallest pack anyway, and a worker
    is ready several evaluations sooner.
    """
    one, cost = _guided_picture(pipeline)
    measured = [] if _takes_too_long(pipeline, cost) else profile(pipeline, clock)
    if not measured and is_compiled(pipeline.network):
        pipeline.denoiser.evaluate([one])  # compiles it, which must not happen in someone's request
    chosen = largest_good(measured) if measured else cost
    log.info(
        "patch budget",
        model=pipeline.manifest.name,
        patches=chosen,
        milliseconds={each.patches: round(1000 * each.seconds, 1) for each in measured},
    )
    return chosen


def _guided_picture(pipeline: Pipeline) -> tuple[Evaluation, int]:
    """Returns an evaluation of one guided picture, and its cost in patches."""
    words = pipeline.manifest.class_names[0] if pipeline.manifest.class_names else "picture"
    plan = Plan(pipeline.noise(0), (0.5,), guidance=2.0)
    return Evaluation(plan, pipeline.condition_on(words), Memory()), pipeline.denoiser.patches(plan)


def _takes_too_long(pipeline: Pipeline, patches: int) -> bool:
    """Whether a pack is too slow beyond doubt: at the device's peak, its matrix products alone would take too long."""
    gflop = patch_flops(pipeline.manifest) * patches / 1e9
    if gflop < LARGE_GFLOP:
        return False
    peak = matmul_peak(pipeline.device, pipeline.denoiser.dtype, PEAK_SIDE) * crew(pipeline.device).parts
    return gflop / peak > DOUBT * STEP_SECONDS


def largest_good(measured: list[Measured]) -> int:
    """Returns the patches of the largest pack with at least `ENOUGH` of the best throughput.

    Only packs that take at most `STEP_SECONDS` count; if there are none, the smallest pack is returned.
    """
    quick = [each for each in measured if each.seconds <= STEP_SECONDS] or measured[:1]
    best = max(each.throughput for each in quick)
    return max(each.patches for each in quick if each.throughput >= ENOUGH * best)


def profile(pipeline: Pipeline, clock: Clock = time.perf_counter) -> list[Measured]:
    """Times packs of 1, 2, 4 … guided pictures. Takes the best of several rounds, as other processes disturb it."""
    one, cost = _guided_picture(pipeline)
    pipeline.denoiser.evaluate([one])  # the first evaluation includes one-time set-up

    def seconds(pictures: int) -> float:
        began = clock()
        pipeline.denoiser.evaluate([one] * pictures)
        synchronize(pipeline.device)
        return clock() - began

    began, best = clock(), {1: seconds(1)}
    while max(best) * cost <= MOST_PATCHES / 2 and best[max(best)] <= STEP_SECONDS:
        best[2 * max(best)] = seconds(2 * max(best))
    while clock() - began < SECONDS:
        best = {pictures: min(so_far, seconds(pictures)) for pictures, so_far in best.items()}
    return [Measured(pictures * cost, least) for pictures, least in best.items()]

"""What this machine can do with a bundle: is everything right, and how fast is it. For `patchforge doctor`."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from patchforge.model.denoiser import Condition, Evaluation, Memory
from patchforge.model.device import best_device, serving_dtype, synchronize
from patchforge.model.flops import matmul_peak, patch_flops
from patchforge.model.openmp import usable_cores
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import SAMPLERS
from patchforge.model.trajectory import Trajectory
from patchforge.model.types import Grid, Plan

PACK = 4
"""Pictures that are evaluated together, to compare with alone."""
ROUNDS = 5
LEAST_PSNR = 25.0
"""PSNR in dB between a device's picture and the CPU's in float32. Other noise gives less than 21."""
EXACT, CLOSE = 1e-4, 0.05
"""Largest difference of packed predictions in float32 and in bf16, in standard deviations of the velocity."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    found: str
    ok: bool | None = None
    """None: a fact, not a check."""
    advice: str = ""
    """What to do or to set; empty: nothing."""


def examine(bundles: list[Path | str]) -> Iterator[Check]:
    """Describe the machine, then check every bundle on the device that would serve it.

    Raises:
        DeviceError: the chosen device does not work here.
        BundleError: a bundle cannot be loaded.
    """
    device = best_device()
    yield from machine_facts(device)
    for bundle in bundles:
        yield from bundle_checks(Pipeline.open(bundle, device))


def machine_facts(device: torch.device) -> Iterator[Check]:
    """Versions, cores, memory, and the peak of large matrix products in both precisions."""
    yield Check("versions", f"patchforge {version('patchforge')}, torch {torch.__version__}, {platform.platform()}")
    seen, usable = os.cpu_count() or 1, usable_cores()
    advice = "" if seen == usable else "a quota limits this process; thread counts follow it by themselves"
    yield Check("cores", f"{usable} of {seen} usable, {torch.get_num_threads()} threads", advice=advice)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Check("memory", f"{size / 2**30:.1f} GiB", size > 2**30, "" if size > 2**30 else "a worker needs 1 GiB")
    chosen = serving_dtype(device)
    yield Check("device", f"{device}, products in {_short(chosen)}")
    peaks = {dtype: matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    faster = max(peaks, key=lambda dtype: peaks[dtype])
    gain = peaks[faster] / peaks[chosen]
    advice = "" if gain < 1.2 else f"PATCHFORGE_PRECISION={_short(faster)} may be up to {gain:.1f} times as fast"
    found = ", ".join(f"{_short(dtype)} {peak:,.0f} GFLOP/s" for dtype, peak in peaks.items())
    yield Check("matrix products", found, advice=advice)


def bundle_checks(pipeline: Pipeline) -> Iterator[Check]:
    """Check one bundle: packed against alone, every sampler, the CPU's picture, speed and memory."""
    name = pipeline.manifest.name
    worst = packed_difference(pipeline)
    limit = EXACT if pipeline.denoiser.dtype is torch.float32 else CLOSE
    yield Check(f"{name}: packed as alone", f"largest difference {worst:.1e}", worst <= limit)
    broken = [sampler for sampler in SAMPLERS if not _draws(pipeline, sampler)]
    found = f"not finite: {', '.join(broken)}" if broken else f"all {len(SAMPLERS)} draw"
    yield Check(f"{name}: samplers", found, not broken)
    if pipeline.device.type != "cpu":
        psnr = psnr_to_cpu(pipeline)
        yield Check(f"{name}: as on the CPU", f"PSNR {psnr:.1f} dB", psnr > LEAST_PSNR)
    for (width, height), grid in pipeline.grids.items():
        first, seconds = picture_seconds(pipeline, grid)
        found = f"{seconds:.2f} s a picture alone, its first preview after {first:.2f} s"
        yield Check(f"{name}: {width}×{height}", found)
    rate = packed_rate(pipeline)
    peak = matmul_peak(pipeline.device, pipeline.denoiser.dtype)
    share = rate * patch_flops(pipeline.manifest) / 1e9 / peak
    yield Check(f"{name}: speed", f"{rate:,.0f} patches/s packed, {share:.0%} of the peak above")
    if pipeline.device.type != "cpu":
        used = torch.accelerator.memory_allocated(pipeline.device)
        yield Check(f"{name}: device memory", f"{used / 2**30:.2f} GiB used by PyTorch")


def packed_difference(pipeline: Pipeline) -> float:
    """Largest difference between predictions of `PACK` pictures together and alone, in deviations of the velocity.

    The pictures have all sizes of the model in turn.
    """
    grids = list(pipeline.grids.values())
    evaluations = [_evaluation(pipeline, seed, grids[seed % len(grids)]) for seed in range(PACK)]
    together = pipeline.denoiser.evaluate(evaluations)
    alone = [pipeline.denoiser.evaluate([each])[0] for each in evaluations]
    pairs = [(a.velocity.float(), b.velocity.float()) for a, b in zip(together, alone, strict=True)]
    return max(float((a - b).abs().max() / b.std()) for a, b in pairs)


def psnr_to_cpu(pipeline: Pipeline) -> float:
    """PSNR in dB of a picture of this pipeline, against the same picture drawn on the CPU."""
    other = Pipeline.open(pipeline.folder, torch.device("cpu"))
    made = [each.sample(each.default_sampler(), [_condition(each)], [0])[0].float() for each in (pipeline, other)]
    error = float((made[0] - made[1]).square().mean())
    return 10 * math.log10(255**2 / max(error, 1e-6))


def picture_seconds(pipeline: Pipeline, grid: Grid) -> tuple[float, float]:
    """Seconds from a new prompt to the first preview, and to the picture, with the bundle's defaults: medians."""
    firsts, wholes = zip(*(_time_picture(pipeline, grid, number) for number in range(ROUNDS)), strict=True)
    return median(firsts), median(wholes)


def _time_picture(pipeline: Pipeline, grid: Grid, number: int) -> tuple[float, float]:
    """Seconds to the first preview and to the picture, which waits for it.

    The preview shows the estimate of the first evaluation, by the decoder that a worker takes for it.
    """
    first: list[float] = []
    sampler, started = pipeline.default_sampler(grid=grid), time.perf_counter()

    def show(runs: list[Trajectory]) -> None:
        if not first:
            patches, of = runs[0].seen
            pipeline.preview(patches[None], of)
            first.append(time.perf_counter() - started)

    pipeline.sample(sampler, [_condition(pipeline, number)], [number], after_step=show)
    return first[0], time.perf_counter() - started


def packed_rate(pipeline: Pipeline) -> float:
    """Patches per second of a pack of the model's own size; the best of `ROUNDS`."""
    evaluations = [_evaluation(pipeline, seed, pipeline.grid) for seed in range(PACK)]
    pack = math.inf
    for _ in range(ROUNDS):
        started = time.perf_counter()
        pipeline.denoiser.evaluate(evaluations)
        synchronize(pipeline.device)
        pack = min(pack, time.perf_counter() - started)
    return sum(pipeline.denoiser.patches(each.plan) for each in evaluations) / pack


def _draws(pipeline: Pipeline, name: str) -> bool:
    _, [run] = pipeline.sample(pipeline.sampler(name, steps=2, guidance=2.0), [_condition(pipeline)], [0])
    return bool(torch.isfinite(run.state.x).all()) and bool((run.state.times == 1).all())


def _evaluation(pipeline: Pipeline, seed: int, grid: Grid) -> Evaluation:
    noise: Tensor = pipeline.noise(seed, grid)
    return Evaluation(Plan(noise, (0.25 + seed / 10,), guidance=2.0), _condition(pipeline), Memory(), grid)


def _condition(pipeline: Pipeline, number: int = 0) -> Condition:
    """What to draw. Each number is another prompt, so that none comes from the pipeline's cache."""
    names = pipeline.manifest.class_names
    return pipeline.condition_on(names[number % len(names)] if names else f"red apple {number}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

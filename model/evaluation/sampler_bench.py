"""What the samplers cost and how close they come: patch evaluations, seconds and PSNR, in one run.

PSNR is of the pictures, against a fine solution from the same noise: it measures the sampler, not the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.device import serving_dtype
from model.generate import Trajectory, run
from model.pipeline import Pipeline

REFERENCE_STEPS = 100
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("multistep", {"steps": 8, "exponent": 1.5}),
    ("multistep", {"steps": 12, "exponent": 1.5}),
    ("multistep", {"steps": 12, "exponent": 1.0}),
    ("euler", {"steps": 8}),
    ("euler", {"steps": 16}),
    ("euler", {"steps": 32}),
    ("look_ahead", {"steps": 16}),
    *(
        ("dual_loop", {"steps": 8, "quantile": quantile, "inner_steps": 4, "exact": exact})
        for quantile in (0.4, 0.7)
        for exact in (True, False)
    ),
]


@dataclass(frozen=True)
class Row:
    """One sampler, per picture."""

    sampler: str
    options: dict[str, Any]
    patch_evaluations: float
    """Guidance branches included."""
    saved: float
    """Share of the dense run's patch evaluations."""
    seconds: float
    """Of sampling, decoding left out."""
    gflop: float
    """Of the network's matrix products, attention included; counted while it runs."""
    floor_seconds: float
    """``gflop`` at the peak measured for large products in the same precision on this machine."""
    psnr: float
    """dB against multistep with `REFERENCE_STEPS` steps."""


def bench_samplers(pipeline: Pipeline, prompts: list[str], guidance: float, seed: int = 0) -> Iterator[Row]:
    """Every configuration on the same prompts and noise, all pictures of one packed together."""
    conditions = [pipeline.condition_on(prompt) for prompt in prompts]
    seeds = list(range(seed, seed + len(prompts)))
    peak = matmul_peak(pipeline.device)

    def sample(name: str, options: dict[str, Any]) -> list[Trajectory]:
        sampler = pipeline.sampler(name, guidance=guidance, **options)
        runs = [Trajectory.begin(sampler, c, pipeline.noise(s)) for c, s in zip(conditions, seeds, strict=True)]
        run(pipeline.denoiser, runs)
        return runs

    def decode(runs: list[Trajectory]) -> Tensor:
        return pipeline.decode(torch.stack([each.state.x for each in runs]))

    reference = decode(sample("multistep", {"steps": REFERENCE_STEPS}))
    for name, options in CONFIGURATIONS:
        # Plain attention, for the counter does not see into the fused kernel; it also warms up what is timed next.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample(name, options)
        started = time.perf_counter()
        runs = sample(name, options)
        seconds = time.perf_counter() - started
        done = sum(each.patch_evaluations for each in runs)
        dense = sum(each.sampler.dense_patch_evaluations for each in runs)
        gflop = counter.get_total_flops() / 1e9 / len(prompts)
        yield Row(
            sampler=name,
            options=options,
            patch_evaluations=done / len(prompts),
            saved=1 - done / dense,
            seconds=seconds / len(prompts),
            gflop=gflop,
            floor_seconds=gflop / peak,
            psnr=picture_psnr(decode(runs), reference),
        )


def picture_psnr(pictures: Tensor, reference: Tensor) -> float:
    """Mean over pictures, in dB, of uint8 ``(b, height, width, 3)``; identical pictures count 60 dB."""
    error = (pictures.float() - reference.float()).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(255**2 / error.clamp(min=255**2 / 1e6))).mean())


def matmul_peak(device: torch.device, side: int = 2048) -> float:
    """GFLOP/s of a large matrix product in the precision pictures are served in: the best of five."""
    a = torch.randn(side, side, device=device, dtype=serving_dtype(device))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9

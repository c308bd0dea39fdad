"""What the samplers cost and how good their pictures are, on the same prompts and noise, in one run.

Costs are patch evaluations, seconds and FLOPs. PSNR, against a fine solution from the same noise, measures how well
the sampler solves its equation, not the model. Where there are real pictures to compare with, `PictureQuality` tells
what can be seen of it: Fréchet distance, and whether the judge finds the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.denoiser import Condition
from model.device import serving_dtype
from model.evaluation.frechet import Gaussian, Interval, frechet_difference, frechet_interval, mean_interval
from model.evaluation.judge import Judge
from model.evaluation.measure import Ranks, group_of
from model.generate import Trajectory, run
from model.pipeline import Pipeline

REFERENCE_STEPS = 60
PACK = 16
"""Pictures that share an evaluation; PSNR is of the first pack."""
COUNTED = 4
"""Pictures whose FLOPs are counted: counting is slow."""


@dataclass(frozen=True)
class Configuration:
    """A sampler with its options; ``steps`` among them."""

    sampler: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.sampler, *(f"{key}={value}" for key, value in self.options.items())])


PAPER = (
    Configuration("dual_loop", {"steps": 25, "quantile": 0.4, "inner_steps": 4, "exact": True}),
    Configuration("look_ahead", {"steps": 50}),
)
"""The paper's samplers at 100 network evaluations, every patch in each."""
UNIFORM = (
    *(Configuration("multistep", {"steps": steps, "exponent": 1.25}) for steps in (3, 4, 5, 6, 8, 12)),
    *(Configuration("heun", {"steps": steps}) for steps in (2, 3, 5)),
    *(Configuration("euler", {"steps": steps}) for steps in (3, 4, 5, 6, 8, 16)),
)
PAPER_CHEAPER = (
    Configuration("look_ahead", {"steps": 16}),
    *(
        Configuration("dual_loop", {"steps": 8, "quantile": 0.7, "inner_steps": 4, "exact": exact})
        for exact in (True, False)
    ),
)


@dataclass(frozen=True)
class PictureQuality:
    """What can be seen of a sampler."""

    distance: Interval
    """Fréchet distance to real pictures, in the judge's features."""
    difference: Interval | None
    """That less the baseline's, pictures paired by prompt and noise; None for the baseline itself."""
    top1: Interval
    """How often the judge finds a prompt's picture first among all of the run."""
    top5: Interval
    top5_difference: Interval | None
    """That less the baseline's, paired likewise."""

    @property
    def not_told(self) -> bool:
        """Neither farther from real pictures than the baseline's nor less often found, beyond both intervals."""
        if self.difference is None or self.top5_difference is None:
            return False
        return self.difference.low <= 0 <= self.top5_difference.high


@dataclass(frozen=True)
class Row:
    """One configuration; costs are per picture."""

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
    finished_by_half: float
    """Share of patches at t = 1 when half of the steps are done."""
    quality: PictureQuality | None = None


@dataclass(frozen=True)
class Gallery:
    """Real pictures to hold those made against."""

    judge: Judge
    real: Gaussian
    """Of their features."""
    concepts: list[str]
    """``(n,)``: what the n prompts of the run show."""
    floor: Interval
    """Distance of the real pictures of these prompts, which no sampler can be asked to beat."""


class SamplerBench:
    """Runs configurations one after another on the same prompts and noise."""

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        guidance: float,
        gallery: Gallery | None = None,
        seed: int = 0,
    ) -> None:
        """The first configuration measured is the baseline of the paired differences."""
        self.pipeline, self.prompts, self.guidance, self.gallery = pipeline, list(prompts), guidance, gallery
        self.conditions = [pipeline.condition_on(prompt) for prompt in prompts]
        self.seeds = range(seed, seed + len(self.prompts))
        self.peak = matmul_peak(pipeline.device)
        self.texts = None if gallery is None else gallery.judge.embed(self.prompts)
        self.baseline: tuple[Tensor, Tensor] | None = None
        """Features, and whether the prompt was among the first five, of the first configuration measured."""
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        """The same of each configuration."""
        fine = Configuration("multistep", {"steps": REFERENCE_STEPS})
        self.reference = self._decode(self._sample(fine, 0)[0])

    def measure(self, configurations: Sequence[Configuration]) -> Iterator[Row]:
        """One row a configuration."""
        for each in configurations:
            yield self._measure(each)

    def _measure(self, configuration: Configuration) -> Row:
        # Plain attention, for the counter does not see into the fused kernel; it also warms up what is timed next.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            first, _ = self._sample(configuration, 0, COUNTED)
        pictures, seconds, done, dense, halves = [], 0.0, 0, 0, []
        for start in range(0, len(self.prompts), PACK):
            began = time.perf_counter()
            runs, half = self._sample(configuration, start)
            seconds += time.perf_counter() - began
            pictures.append(self._decode(runs))
            done += sum(each.patch_evaluations for each in runs)
            dense += sum(each.sampler.dense_patch_evaluations for each in runs)
            halves.append(half)
        count = len(self.prompts)
        gflop = counter.get_total_flops() / 1e9 / len(first)
        return Row(
            sampler=configuration.sampler,
            options=configuration.options,
            patch_evaluations=done / count,
            saved=1 - done / dense,
            seconds=seconds / count,
            gflop=gflop,
            floor_seconds=gflop / self.peak,
            psnr=picture_psnr(pictures[0], self.reference),
            finished_by_half=sum(halves) / len(halves),
            quality=self._quality(configuration, torch.cat(pictures)),
        )

    def differences(self, one: Row, other: Row) -> tuple[Interval, Interval]:
        """Distance to real pictures, and how often the prompt is among the first five, of one row's pictures less that
        of the other's, paired by prompt and noise."""
        if self.gallery is None:
            raise ValueError("without real pictures there is no quality to compare")
        ours, theirs = (self.seen[str(Configuration(row.sampler, row.options))] for row in (one, other))
        concepts = group_of(self.gallery.concepts)
        return frechet_difference(self.gallery.real, ours[0], theirs[0]), mean_interval(ours[1] - theirs[1], concepts)

    def cheapest_as_good(self, rows: Sequence[Row], as_this: Row) -> tuple[Row, Interval, Interval] | None:
        """The row of fewest patch evaluations whose pictures are neither farther from real ones than ``as_this`` row's
        nor less often found, beyond both intervals, with its `differences`."""
        for row in sorted(rows, key=lambda row: row.patch_evaluations):
            distance, found = self.differences(row, as_this)
            if distance.low <= 0 <= found.high:
                return row, distance, found
        return None

    def _quality(self, configuration: Configuration, pictures: Tensor) -> PictureQuality | None:
        if self.gallery is None or self.texts is None:
            return None
        judge, real = self.gallery.judge, self.gallery.real
        features = judge.features(pictures)
        ranks = Ranks.of(-judge.text_scores(features, self.texts).T, torch.arange(len(pictures)), self.gallery.concepts)
        among_five = (ranks.ranks < 5).float()
        self.seen[str(configuration)] = features, among_five
        difference = found_difference = None
        if self.baseline is None:
            self.baseline = features, among_five
        else:
            difference = frechet_difference(real, features, self.baseline[0])
            found_difference = mean_interval(among_five - self.baseline[1], group_of(ranks.concepts))
        return PictureQuality(
            frechet_interval(real, features), difference, ranks.share(1), ranks.share(5), found_difference
        )

    def _sample(self, configuration: Configuration, start: int, count: int = PACK) -> tuple[list[Trajectory], float]:
        """A pack of pictures, and the share of their patches that had finished by half of the steps."""
        options = dict(configuration.options)
        sampler = self.pipeline.sampler(configuration.sampler, guidance=self.guidance, **options)
        some: list[Condition] = self.conditions[start : start + count]
        noise = [self.pipeline.noise(seed) for seed in self.seeds[start : start + count]]
        runs = [Trajectory.begin(sampler, c, n) for c, n in zip(some, noise, strict=True)]
        finished: dict[int, float] = {}

        def after_step(live: list[Trajectory]) -> None:
            for each in live:
                if each.state.step <= sampler.steps / 2:  # steps: those in which nothing is evaluated count too
                    finished[id(each)] = float((each.state.times >= 1).float().mean())

        run(self.pipeline.denoiser, runs, after_step)
        return runs, sum(finished.values()) / len(runs)

    def _decode(self, runs: list[Trajectory]) -> Tensor:
        return self.pipeline.decode(torch.stack([each.state.x for each in runs]))


def cheapest_equal(rows: Sequence[Row]) -> Row | None:
    """The row of fewest patch evaluations whose pictures are `PictureQuality.not_told` from the baseline's."""
    able = [row for row in rows if row.quality is not None and row.quality.not_told]
    return min(able, key=lambda row: row.patch_evaluations, default=None)


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

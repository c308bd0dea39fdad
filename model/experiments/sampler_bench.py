"""The cost of samplers and the quality of their pictures, on the same prompts and noise, in one run.

Costs are patch evaluations, seconds and FLOPs. PSNR compares with a fine solution from the same noise, so it measures
how well the sampler solves its equation, and not the model. With real pictures, `PictureQuality` measures what people
can see: the outside judge's figures (see `Lineup`), and as a second opinion those of our own judge.
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

from patchforge.model.denoiser import Condition
from patchforge.model.evaluation.frechet import Gaussian, Interval, frechet_difference, frechet_interval, mean_interval
from patchforge.model.evaluation.judge import Judge
from patchforge.model.evaluation.lineup import Lineup, worse
from patchforge.model.evaluation.measure import rank_of_own
from patchforge.model.evaluation.outside import OutsideJudge, Sight
from patchforge.model.flops import matmul_peak
from patchforge.model.parallel import here
from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import Trajectory, run

HALF_WAY = 0.5
REFERENCE_STEPS = 60
PACK = 16
"""Pictures that share an evaluation. PSNR uses the first pack only."""
COUNTED = 4
"""Pictures whose FLOPs are counted. Counting is slow."""


@dataclass(frozen=True)
class Configuration:
    """A sampler with its options, including `steps`."""

    sampler: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.sampler, *(f"{key}={value}" for key, value in self.options.items())])


PAPER = (
    Configuration("dual_loop", {"steps": 25, "quantile": 0.4, "inner_steps": 4, "exact": True}),
    Configuration("look_ahead", {"steps": 50}),
)
"""The paper's samplers at 100 network evaluations of every patch."""
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
    """How good a sampler's pictures look, by name of the figure: see `Gallery.figures`."""

    figures: dict[str, Interval]
    differences: dict[str, Interval] | None
    """The figures less those of the baseline, paired by prompt and noise. None: this is the baseline."""

    @property
    def worse(self) -> list[str]:
        """The figures that show, beyond their interval, that these pictures are worse than the baseline's."""
        return worse(self.differences or {})

    @property
    def indistinguishable(self) -> bool:
        """True if no figure shows that these pictures are worse than the baseline's."""
        return self.differences is not None and not self.worse


@dataclass(frozen=True)
class Row:
    """The results of one configuration. Costs are per picture."""

    sampler: str
    options: dict[str, Any]
    patch_evaluations: float
    """In all guidance branches."""
    saved: float
    """Patch evaluations saved, as a share of a dense run's."""
    seconds: float
    """Seconds of sampling, without decoding."""
    gflop: float
    """GFLOP of the network's matrix products, with attention; counted in a run."""
    floor_seconds: float
    """Seconds for `gflop` at this machine's peak for large matrix products in the same precision."""
    psnr: float
    """PSNR in dB, against multistep with `REFERENCE_STEPS` steps."""
    finished_half_way: float
    """Share of patches that finish by the evaluation at t = 0.5."""
    quality: PictureQuality | None = None


@dataclass(frozen=True)
class Opinion:
    """What both judges see of the pictures of all prompts."""

    outside: Sight
    own: Tensor
    """Features `(n, d)` of our own judge."""
    own_five: Tensor
    """`(n,)`: 1 if our own judge ranks the prompt's picture among the first five of the run, else 0."""


@dataclass(frozen=True)
class Gallery:
    """Prompts with real pictures, and two judges that compare generated pictures with them."""

    lineup: Lineup
    outside: OutsideJudge
    judge: Judge
    real: Gaussian
    """Fitted to the features that our own judge sees of real pictures of other concepts."""
    texts: Tensor
    """The prompts, as our own judge reads them."""

    def view(self, pictures: Tensor) -> Opinion:
        """Show both judges the pictures `(n, height, width, 3)` uint8 of all prompts."""
        own = self.judge.features(pictures)
        ranks = rank_of_own(-self.judge.text_scores(own, self.texts).T, torch.arange(len(pictures)))
        return Opinion(self.outside.look(pictures), own, (ranks < 5).float())

    def figures(self, made: Opinion) -> dict[str, Interval]:
        """The outside judge's figures, and our own judge's `own distance` and `own top five`."""
        return self.lineup.figures(made.outside) | {
            "own distance": frechet_interval(self.real, made.own),
            "own top five": mean_interval(made.own_five, self.lineup.concepts),
        }

    def differences(self, made: Opinion, other: Opinion) -> dict[str, Interval]:
        """The same figures of `made` less those of `other`."""
        return self.lineup.differences(made.outside, other.outside) | {
            "own distance": frechet_difference(self.real, made.own, other.own),
            "own top five": mean_interval(made.own_five - other.own_five, self.lineup.concepts),
        }


class SamplerBench:
    """Measures configurations one after another, on the same prompts and noise."""

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        guidance: float,
        gallery: Gallery | None = None,
        seed: int = 0,
    ) -> None:
        """The first measured configuration becomes the baseline of the paired differences."""
        self.pipeline, self.prompts, self.guidance, self.gallery = pipeline, list(prompts), guidance, gallery
        self.conditions = [pipeline.condition_on(prompt) for prompt in prompts]
        self.seeds = range(seed, seed + len(self.prompts))
        self.peak = matmul_peak(pipeline.device, pipeline.denoiser.dtype)
        self.seen: dict[str, Opinion] = {}
        """By configuration, in the order measured: the first is the baseline."""
        fine = Configuration("multistep", {"steps": REFERENCE_STEPS})
        self.reference = self._decode(self._sample(fine, 0)[0])

    def measure(self, configurations: Sequence[Configuration]) -> Iterator[Row]:
        """Measure one row per configuration."""
        for each in configurations:
            yield self._measure(each)

    def _measure(self, configuration: Configuration) -> Row:
        # In this thread, because the counter sees no other; with plain attention, because it cannot see into the fused
        # kernel. This run is also the warm-up.
        with here(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
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
            finished_half_way=sum(halves) / len(halves),
            quality=self._quality(configuration, torch.cat(pictures)),
        )

    def differences(self, one: Row, other: Row) -> dict[str, Interval]:
        """Compare two rows, paired by prompt and noise: figures of one − figures of the other.

        Raises:
            ValueError: the bench has no real pictures.
        """
        if self.gallery is None:
            raise ValueError("comparing quality requires real pictures")
        ours, theirs = (self.seen[str(Configuration(row.sampler, row.options))] for row in (one, other))
        return self.gallery.differences(ours, theirs)

    def cheapest_as_good(self, rows: Sequence[Row], as_this: Row) -> tuple[Row, dict[str, Interval]] | None:
        """Find the row with the fewest patch evaluations that no figure shows to be worse than `as_this` row.

        Returns it with its `differences`.
        """
        for row in sorted(rows, key=lambda row: row.patch_evaluations):
            differences = self.differences(row, as_this)
            if not worse(differences):
                return row, differences
        return None

    def _quality(self, configuration: Configuration, pictures: Tensor) -> PictureQuality | None:
        if self.gallery is None:
            return None
        seen = self.gallery.view(pictures)
        baseline = next(iter(self.seen.values()), None)
        self.seen[str(configuration)] = seen
        differences = None if baseline is None else self.gallery.differences(seen, baseline)
        return PictureQuality(self.gallery.figures(seen), differences)

    def _sample(self, configuration: Configuration, start: int, count: int = PACK) -> tuple[list[Trajectory], float]:
        """Make a pack of pictures. Also return the share of patches that had finished half way."""
        options = dict(configuration.options)
        sampler = self.pipeline.sampler(configuration.sampler, guidance=self.guidance, **options)
        some: list[Condition] = self.conditions[start : start + count]
        noise = [self.pipeline.noise(seed) for seed in self.seeds[start : start + count]]
        runs = [self.pipeline.begin(sampler, c, n) for c, n in zip(some, noise, strict=True)]
        finished: dict[int, float] = {}

        def after_step(live: list[Trajectory]) -> None:
            for each in live:
                track = getattr(each.state, "conditional", None)  # no other sampler finishes patches early
                if track is not None and float(track.at.nan_to_num().max()) <= HALF_WAY:
                    finished[id(each)] = float((each.state.times >= 1).float().mean())

        run(self.pipeline.denoiser, runs, after_step)
        return runs, sum(finished.values()) / len(runs)

    def _decode(self, runs: list[Trajectory]) -> Tensor:
        return self.pipeline.decode(torch.stack([each.state.x for each in runs]))


def cheapest_equal(rows: Sequence[Row]) -> Row | None:
    """Find the row with the fewest patch evaluations whose pictures are not worse than the baseline's."""
    able = [row for row in rows if row.quality is not None and row.quality.indistinguishable]
    return min(able, key=lambda row: row.patch_evaluations, default=None)


def picture_psnr(pictures: Tensor, reference: Tensor) -> float:
    """PSNR in dB of pictures `(b, height, width, 3)` uint8, mean over pictures. Identical pictures count as 60 dB."""
    error = (pictures.float() - reference.float()).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(255**2 / error.clamp(min=255**2 / 1e6))).mean())

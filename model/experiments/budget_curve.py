"""How good are pictures on a budget? The same prompts and noise on ever smaller ones, judged from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from patchforge.model.evaluation.frechet import Interval
from patchforge.model.evaluation.lineup import OF_SETS, Lineup, make_lineup
from patchforge.model.evaluation.outside import OutsideJudge, Sight
from patchforge.model.evaluation.samples import make_pictures, words_for
from patchforge.model.experiments.sampler_bench import picture_psnr
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.manifest import ClassNetwork
from patchforge.model.training.data import Pictures

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Of what the model's own choice takes on average."""
CLASS_FIGURES = (*OF_SETS, "sharpness")
"""Those that need no picture of the same prompt."""


@dataclass(frozen=True)
class BudgetPoint:
    """Pictures on one budget, or without one."""

    share: float
    """The budget as a share of what pictures without one take on average. 1: no budget."""
    spent: float
    """Patch evaluations per picture, in all guidance branches."""
    psnr: float
    """Against the same pictures without a budget, in dB; identical ones count as 60."""
    figures: dict[str, Interval]
    differences: dict[str, Interval]
    """Figures minus those without a budget, paired by prompt and noise."""

    def recorded(self) -> dict[str, Any]:
        """For `bundle.json`."""
        return {
            "share": self.share,
            "patch_evaluations": round(self.spent, 1),
            "psnr_db": round(self.psnr, 1),
            "figures": {name: each.rounded() for name, each in self.figures.items()},
            "differences": {name: each.rounded() for name, each in self.differences.items()},
        }


def measure_budgets(
    pipeline: Pipeline,
    judge: OutsideJudge,
    pictures: Pictures,
    shares: Sequence[float] = SHARES,
    count: int = 280,
    seed: int = 0,
) -> list[BudgetPoint]:
    """Measure the model's own choice without a budget, then on one of each of `shares` of what that took.

    A share below one look at every patch counts as that. `count` and the halves of prompts are as in `make_lineup`.

    Raises:
        DataError: there are no pictures to ask for.
    """
    pictures = pictures.resized(pipeline.manifest.size[0])
    lineup = make_lineup(pictures, judge, count, seed=seed)
    words, sampler = words_for(pipeline, lineup.asked), pipeline.default_sampler()
    draw = partial(make_pictures, pipeline, sampler, words, range(seed, seed + len(words)))
    whole = draw(label="no budget")
    seen = judge.look(whole.pictures)
    wanted = CLASS_FIGURES if isinstance(pipeline.manifest.network, ClassNetwork) else None
    points = [_point(lineup, 1.0, whole.patch_evaluations, whole.pictures, whole.pictures, seen, seen, wanted)]
    for share in shares:
        budget = max(sampler.grid.patches, round(share * whole.patch_evaluations))
        made = draw(label=f"{share:.0%}", budget=budget)
        sight = judge.look(made.pictures)
        points.append(_point(lineup, share, made.patch_evaluations, made.pictures, whole.pictures, sight, seen, wanted))
    return points


def _point(
    lineup: Lineup,
    share: float,
    spent: float,
    pictures: Tensor,
    whole: Tensor,
    sight: Sight,
    seen: Sight,
    wanted: Sequence[str] | None,
) -> BudgetPoint:
    figures, differences = lineup.figures(sight), lineup.differences(sight, seen)
    return BudgetPoint(
        share,
        spent,
        picture_psnr(pictures, whole),
        {name: each for name, each in figures.items() if wanted is None or name in wanted},
        {name: each for name, each in differences.items() if wanted is None or name in wanted},
    )

"""Short paired trainings that justify the recipe. Each changes one choice; all else is the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchforge.model.evaluation.calibration import velocity_error
from patchforge.model.evaluation.frechet import Gaussian, Interval, frechet_difference, frechet_interval, mean_interval
from patchforge.model.evaluation.judge import Judge
from patchforge.model.evaluation.quality import split_pictures
from patchforge.model.evaluation.samples import make_pictures, words_for
from patchforge.model.experiments.claims_training import Setting, train_paired
from patchforge.model.pipeline import Pipeline
from patchforge.model.training.data import Pictures
from patchforge.model.training.loop import Recipe
from patchforge.model.training.timesteps import LTG

RECIPE = "recipe"
STEPS = 10
"""Steps of the multistep sampler that makes the pictures of every trained model."""


@dataclass(frozen=True)
class Trial:
    """One training: its changes to the recipe, and a factor for the batch, with the same number of samples."""

    label: str
    changes: dict[str, Any]
    batch: float = 1.0

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe of this trial. The number of samples stays the same, except for rounding."""
        batch = max(1, round(base.batch * self.batch))
        steps = max(1, round(base.steps * base.batch / batch))
        return replace(base, batch=batch, steps=steps, sample_every=steps, **self.changes)


TRIALS = {
    RECIPE: Trial("the recipe", {}),
    "adamw": Trial("AdamW for the matrices too", {"muon_rate": None}),
    "adamw-fast": Trial("the same, at three times the rate", {"muon_rate": None, "adam_rate": 4.5e-3}),
    "constant": Trial("learning rate constant to the end", {"constant_share": 1.0}),
    "last": Trial("last weights, not their average", {"average": 0.0}),
    "half": Trial("half the batch, twice the steps", {}, batch=0.5),
    "double": Trial("twice the batch, half the steps", {}, batch=2.0),
    "ltg": Trial("LTG alone: no shared times, no clean patches", {"timesteps": LTG(loc=0.5)}),
}


@dataclass(frozen=True)
class Found:
    """The result of a trial."""

    key: str
    label: str
    steps: int
    batch: int
    seconds: float
    """Seconds of training."""
    error: Interval
    """Squared error of the velocity on held-out concepts: all patches at one time, mean over ten times."""
    error_difference: Interval | None
    """Error − error of the recipe, in pairs. None: this is the recipe."""
    distance: Interval
    """Fréchet distance of generated pictures."""
    distance_difference: Interval | None

    def figures(self) -> dict[str, Any]:
        """The result for JSON."""
        spans = {name: value.rounded(5) for name, value in vars(self).items() if isinstance(value, Interval)}
        plain = {name: value for name, value in vars(self).items() if isinstance(value, str | int | float)}
        return plain | spans


def run_trials(
    table: Pictures, judge: Judge, latents_of: Path, folder: Path, setting: Setting, names: list[str], count: int
) -> Iterator[Found]:
    """Train every model that is not trained yet, the recipe first, and compare each with the recipe.

    Each model makes `count` pictures, with the same classes and noise.

    Raises:
        DataError: `folder` holds a model that was trained in another way.
    """
    pictures = setting.pictures(table)
    split = split_pictures(pictures, count)
    held_out = pictures.where(pictures.held_out())
    gaussian = Gaussian.of(judge.features(split.reference.images), torch.from_numpy(split.reference.weights))
    of_recipe: tuple[Tensor, Tensor] | None = None
    for name in [RECIPE, *(name for name in names if name != RECIPE)]:
        recipe = TRIALS[name].recipe(setting.recipe("mixed"))
        pipeline = Pipeline.open(train_paired(table, latents_of, folder, setting, name, recipe))
        errors = velocity_error(pipeline, held_out)
        sampler = pipeline.sampler("multistep", STEPS, 1.0)
        made = make_pictures(pipeline, sampler, words_for(pipeline, split.real), range(count), name)
        features = judge.features(made.pictures)
        record: Any = pipeline.manifest.training
        yield Found(
            key=name,
            label=TRIALS[name].label,
            steps=record["steps"],
            batch=record["recipe"]["batch"],
            seconds=record["device_seconds"],
            error=mean_interval(errors),
            error_difference=None if of_recipe is None else mean_interval(errors - of_recipe[0]),
            distance=frechet_interval(gaussian, features),
            distance_difference=None if of_recipe is None else frechet_difference(gaussian, features, of_recipe[1]),
        )
        of_recipe = of_recipe or (errors, features)

"""Ends a copy of an endless run: lets the learning rate of its current state fall."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from patchforge.model.errors import DataError
from patchforge.model.training.loop import STATE, Recipe

BEGUN = "begun.json"
SHORT_AVERAGE = 0.997
"""Averages the last few hundred steps. A longer average would mostly hold weights from before the rate fell."""


def falling(run: Path, folder: Path, recipe: Recipe, minutes: float) -> Recipe:
    """Return `recipe` with learning rates that fall from the current rate of `run` to 2 %, in `minutes` of training.

    The state of `run` is copied to `folder` the first time, and `run` itself can continue undisturbed. A stopped copy
    continues where it was.

    Raises:
        DataError: `run` has no state yet.
    """
    mark = folder / BEGUN
    if not mark.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(run / STATE, folder / STATE)
        except FileNotFoundError as error:
            raise DataError(f"{run} has no state to continue from") from error
        state = torch.load(folder / STATE, weights_only=True, mmap=True)
        mark.write_text(json.dumps({"step": state["step"], "minutes": state["seconds"] / 60}) + "\n")
    begun = json.loads(mark.read_text())["minutes"]
    total = begun + minutes
    return replace(recipe, minutes=total, constant_share=begun / total, average=min(recipe.average, SHORT_AVERAGE))

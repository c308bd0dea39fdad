"""Ends a copy of an endless run: lets the learning rate of its current state fall."""

from __future__ import annotations

import json
import shutil
import sys
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

    The state of `run` is copied to `folder` the first time, with the autoencoder if `run` has its own; `run` itself can
    continue undisturbed. A stopped copy continues where it was. Only the minutes end it, however many steps there were.

    Raises:
        DataError: `run` has no state yet, or `folder` is that of another run.
    """
    mark = folder / BEGUN
    if not mark.exists():
        if (folder / STATE).exists():
            raise DataError(f"{folder} holds another run; name a new folder for the end of {run}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(run / STATE, folder / STATE)
        except FileNotFoundError as error:
            raise DataError(f"{run} has no state to continue from") from error
        if (run / "autoencoder").exists():
            shutil.copytree(run / "autoencoder", folder / "autoencoder", dirs_exist_ok=True)
        state = torch.load(folder / STATE, weights_only=True, mmap=True)
        mark.write_text(json.dumps({"step": state["step"], "minutes": state["seconds"] / 60}) + "\n")
    begun = json.loads(mark.read_text())["minutes"]
    total = begun + minutes
    average = min(recipe.average, SHORT_AVERAGE)
    return replace(recipe, steps=sys.maxsize, minutes=total, constant_share=begun / total, average=average)

"""The paired trainings behind docs/claims.md: same start, pictures, order and steps; only the timesteps differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from model.bundle import open_bundle
from model.errors import DataError
from model.training.data import Pictures
from model.training.loop import Recipe
from model.training.run import Size, train_model, unpack_autoencoder
from model.training.timesteps import SCHEDULES

TRAINED = {
    "ltg": "LTG",
    "sit": "one timestep (SiT)",
    "uniform": "uniform per patch",
    "mean": "mean-controlled",
    "mixed": "LTG with shared times and clean patches (ours)",
}
"""Schedule → what the tables call it, in the order they are trained."""


@dataclass(frozen=True)
class Setting:
    """What every training of a comparison shares."""

    style: str = "flat"
    """Pictures of this style only, so that little training shows something; "" takes all."""
    width: int = 128
    depth: int = 4
    steps: int = 2000
    batch: int = 32
    seed: int = 0

    def pictures(self, table: Pictures) -> Pictures:
        """The part of ``table`` that is trained on and compared with; `train_model` holds out some of it."""
        return table.where(np.array([self.style in ("", style) for style in table.styles]))

    def recipe(self, schedule: str) -> Recipe:
        """An average short enough for so few steps; the rest as ever."""
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            average=0.995,
            timesteps=SCHEDULES[schedule],
            seed=self.seed,
            sample_every=self.steps,
        )


def train_claims(table: Pictures, latents_of: Path, folder: Path, setting: Setting, schedule: str) -> Path:
    """`train_paired` with a schedule of `TRAINED`."""
    return train_paired(table, latents_of, folder, setting, schedule, setting.recipe(schedule))


def train_paired(table: Pictures, latents_of: Path, folder: Path, setting: Setting, name: str, recipe: Recipe) -> Path:
    """Train, or go on training, one class-conditional model; returns its bundle. One that is trained is left alone.

    ``latents_of`` is a bundle whose autoencoder all share.

    Raises:
        DataError: the folder holds a model trained otherwise.
    """
    done = bundle_of(folder, name)
    if (done / "bundle.json").exists():
        record = open_bundle(done).manifest.training
        if record["recipe"] != asdict(recipe):
            raise DataError(f"{done} was trained otherwise; give another --folder, or remove it")
        if record["steps"] == recipe.steps:
            return done
    bundle = open_bundle(latents_of)
    autoencoder = unpack_autoencoder(bundle, folder / "autoencoder")
    size = Size(setting.width, setting.depth)
    licence = bundle.manifest.licence
    return train_model("class", setting.pictures(table), autoencoder, folder / name, recipe, size, licence)


def bundle_of(folder: Path, name: str) -> Path:
    """Where `train_paired` writes a model's bundle."""
    return folder / name / f"{name}-bundle"

"""The paired trainings for docs/claims.md: same start, pictures, order and steps. Only the timesteps differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from patchforge.model.errors import DataError
from patchforge.model.storage.bundle import open_bundle
from patchforge.model.training.data import Pictures
from patchforge.model.training.loop import Recipe
from patchforge.model.training.run import Size, train_model, unpack_autoencoder
from patchforge.model.training.timesteps import SCHEDULES

TRAINED = {
    "ltg": "LTG",
    "sit": "one timestep (SiT)",
    "uniform": "uniform per patch",
    "mean": "mean-controlled",
    "mixed": "LTG with shared times and clean patches (ours)",
}
"""Schedule → its name in tables, in the order of training."""


@dataclass(frozen=True)
class Setting:
    """What all trainings of a comparison have in common."""

    style: str = "flat"
    """Use only pictures of this style, so that short trainings show differences; "" uses all."""
    width: int = 128
    depth: int = 4
    steps: int = 2000
    batch: int = 32
    seed: int = 0
    size: int = 128
    """Larger pictures are made as small, in pixels: at 256 patches a training takes four times as long."""

    def pictures(self, table: Pictures) -> Pictures:
        """Select the pictures to train on and to compare with. `train_model` holds out some of them."""
        part = table.where(np.array([self.style in ("", style) for style in table.styles]))
        return part.resized(min(self.size, part.images.shape[1]))

    def recipe(self, schedule: str) -> Recipe:
        """The default recipe, with an average short enough for few steps."""
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            average=0.995,
            timesteps=SCHEDULES[schedule],
            seed=self.seed,
            sample_every=self.steps,
        )


def train_claims(table: Pictures, latents_of: Path, folder: Path, setting: Setting, schedule: str) -> Path:
    """Do `train_paired` with a schedule from `TRAINED`.

    Raises:
        DataError: `folder` holds a model that was trained in another way.
    """
    return train_paired(table, latents_of, folder, setting, schedule, setting.recipe(schedule))


def train_paired(table: Pictures, latents_of: Path, folder: Path, setting: Setting, name: str, recipe: Recipe) -> Path:
    """Train a class-conditional model, or continue its training, and return its bundle. Skips a finished model.

    `latents_of` is a bundle; all trainings share its autoencoder.

    Raises:
        DataError: `folder` holds a model that was trained in another way.
    """
    done = bundle_path(folder, name)
    if (done / "bundle.json").exists():
        record = open_bundle(done).manifest.training
        if record["recipe"] != asdict(recipe):
            raise DataError(f"{done} was trained with another recipe; use another --folder, or remove it")
        if record["steps"] == recipe.steps:
            return done
    bundle = open_bundle(latents_of)
    autoencoder = unpack_autoencoder(bundle, folder / "autoencoder")
    size = Size(setting.width, setting.depth)
    licence = bundle.manifest.licence
    return train_model("class", setting.pictures(table), autoencoder, folder / name, recipe, size, licence)


def bundle_path(folder: Path, name: str) -> Path:
    """The folder to which `train_paired` writes a model's bundle."""
    return folder / name / f"{name}-bundle"

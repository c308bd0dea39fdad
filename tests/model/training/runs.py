"""Short training runs of tiny networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from patchforge.model.storage.bundle import Bundle, open_bundle
from patchforge.model.training.autoencoder import AutoencoderRecipe
from patchforge.model.training.conditions import ClassConditions
from patchforge.model.training.data import Pictures
from patchforge.model.training.loop import Recipe, Trainer
from patchforge.model.training.run import Kind, Size, build, train_model

TINY_AUTOENCODER = AutoencoderRecipe(
    width=16, latent_channels=4, encoder_blocks=(1, 1), decoder_blocks=(1, 0), steps=20, perceptual=0
)
"""For f4 latents, so that pictures of 32 pixels have 16 patches."""


def small_trainer(pictures: Pictures, out: Path, steps: int, minutes: float | None = None) -> Trainer:
    torch.manual_seed(0)
    network = build("class", 4, 8, 2, Size(width=64, depth=2))
    colours = torch.from_numpy(pictures.images[:, 16, 16]).float() / 128 - 1
    latents = torch.cat([colours, colours[:, :1]], dim=1)[:, :, None, None].expand(-1, -1, 8, 8)
    recipe = Recipe(steps=steps, minutes=minutes, batch=16, warm_up=10, save_every_seconds=1e9)
    return Trainer(network, latents, torch.from_numpy(pictures.weights), ClassConditions(pictures), recipe, out)


def train(
    pictures: Pictures,
    out: Path,
    name: str,
    *,
    kind: Kind = "class",
    autoencoder: Path | None = None,
    start: Bundle | None = None,
    width: int = 64,
    **recipe: Any,
) -> Bundle:
    """Run a few steps of `train_model`, with the autoencoder in `out` unless another is given."""
    of = autoencoder or out / "autoencoder"
    done = train_model(kind, pictures, of, out / name, Recipe(batch=16, **recipe), Size(width, 1), "none", start)
    return open_bundle(done)

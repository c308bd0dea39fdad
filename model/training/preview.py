"""Trains the preview decoder, on the latents of a trained autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from patchforge.model.preview import PREVIEW_SCALE, PreviewDecoder
from patchforge.model.storage.bundle import AUTOENCODER_PREVIEW
from patchforge.model.training.autoencoder import to_signed
from patchforge.model.training.autoencoder_loss import reconstruction_loss
from patchforge.model.training.data import Pictures
from patchforge.model.training.latents import autoencoder_downscale, encode_pictures, latent_scale
from patchforge.model.training.progress import progress_bar


@dataclass(frozen=True)
class PreviewRecipe:
    """The defaults take a minute on one core."""

    steps: int = 2000
    batch: int = 8
    rate: float = 3e-3
    seed: int = 0


def train_preview(pictures: Pictures, autoencoder: Path, recipe: PreviewRecipe, cache: Path | None = None) -> float:
    """Train a preview decoder, and save it in the autoencoder's folder.

    Returns the PSNR in dB on pictures of held-out concepts, in the size of previews.
    """
    scale = latent_scale(autoencoder)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (scale.mean, scale.std))
    trained, held_out = np.flatnonzero(pictures.trained()), pictures.held_out()
    latents = encode_pictures(pictures.images[trained], autoencoder, cache)
    weights = torch.from_numpy(pictures.weights[trained]).double()
    size = pictures.images.shape[1] // autoencoder_downscale(autoencoder) * PREVIEW_SCALE
    torch.manual_seed(recipe.seed)
    network = PreviewDecoder(scale.channels)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.rate, betas=(0.9, 0.99))
    with progress_bar() as bar:
        for step in bar.track(range(recipe.steps), description="preview"):
            optimiser.param_groups[0]["lr"] = recipe.rate * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
            picked = torch.multinomial(weights, recipe.batch, replacement=True)
            made, wanted = network(latents[picked] * std + mean), small(pictures.images[trained[picked]], size)
            # It is linear, so it cannot be sharp: L2 asks for colours that are right on average.
            (reconstruction_loss(made, wanted) + F.mse_loss(made, wanted)).backward()
            optimiser.step()
            optimiser.zero_grad()
    network.half().float()  # stored in half precision, so measured like that
    save_file({name: each.half() for name, each in network.state_dict().items()}, autoencoder / AUTOENCODER_PREVIEW)
    images = pictures.images[held_out]
    with torch.inference_mode():
        made = network(encode_pictures(images, autoencoder) * std + mean).clamp(-1, 1)
    error = F.mse_loss(made, small(images, size), reduction="none").mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


def small(images: np.ndarray, size: int) -> Tensor:
    """`(b, h, w, 3)` uint8 → `(b, 3, size, size)` in [-1, 1]. Each pixel is the mean of the pixels it covers."""
    return F.interpolate(to_signed(torch.from_numpy(images)), (size, size), mode="area")

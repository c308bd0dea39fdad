"""Pictures to normalised latents, once, before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.autoencoder import Codec
from model.device import best_device
from model.errors import DataError
from model.manifest import Latent


def encode_pictures(images: np.ndarray, autoencoder: Path) -> Tensor:
    """``(n, height, width, 3)`` uint8 → latents ``(n, c, h, w)``, zero mean and unit deviation per channel."""
    scale = latent_scale(autoencoder)
    # Only the scale matters to the codec; sides are the bundle's concern.
    codec = Codec(autoencoder, "AutoencoderTiny", scale, best_device())
    return torch.cat([codec.encode(chunk).cpu() for chunk in torch.from_numpy(images).split(64)])


def latent_scale(autoencoder: Path) -> Latent:
    """Mean and deviation per latent channel, as measured when the autoencoder was trained.

    Raises:
        DataError: the folder is not one that ``patchforge train autoencoder`` wrote.
    """
    try:
        figures = json.loads((autoencoder / "latents.json").read_text())
        mean, std = figures["mean"], figures["std"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{autoencoder} is not a trained autoencoder: {error}") from error
    return Latent(channels=len(mean), height=1, width=1, mean=mean, std=std)

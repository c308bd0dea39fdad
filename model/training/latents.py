"""Encodes pictures to normalised latents, once, before training."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchforge.model.codec import Codec
from patchforge.model.device import best_device
from patchforge.model.errors import DataError
from patchforge.model.storage.bundle import AUTOENCODER_CONFIG, AUTOENCODER_WEIGHTS, read_autoencoder_config
from patchforge.model.storage.manifest import Latent
from patchforge.model.training.progress import progress_bar

LATENT_FIGURES = "latents.json"
"""File beside an autoencoder's weights: mean and standard deviation of its latents, and its quality."""


def encode_pictures(images: np.ndarray, autoencoder: Path, cache: Path | None = None) -> Tensor:
    """`(n, height, width, 3)` uint8 → latents `(n, c, h, w)`, with zero mean and unit deviation per channel.

    If a folder `cache` is given, latents are kept there for later runs on the same pictures and autoencoder.
    """
    scale = latent_scale(autoencoder)
    if cache is None:
        return _encode(images, autoencoder, scale)
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    for name in (AUTOENCODER_CONFIG, AUTOENCODER_WEIGHTS, LATENT_FIGURES):
        digest.update((autoencoder / name).read_bytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)["latents"]
    latents = _encode(images, autoencoder, scale)
    cache.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    return latents


def _encode(images: np.ndarray, autoencoder: Path, scale: Latent) -> Tensor:
    # The codec needs only the latents' scale; the picture's size matters to bundles only.
    codec = Codec(autoencoder, scale, best_device())
    parts = torch.from_numpy(images).split(8)  # larger parts do not fit into the processor's caches
    with progress_bar() as bar:
        return torch.cat([codec.encode(part).cpu() for part in bar.track(parts, description="latents")]).contiguous()


def latent_scale(autoencoder: Path) -> Latent:
    """Read the mean and deviation per latent channel, as measured when the autoencoder was trained.

    Raises:
        DataError: `patchforge train autoencoder` did not write this folder.
    """
    try:
        figures = json.loads((autoencoder / LATENT_FIGURES).read_text())
        mean, std = figures["mean"], figures["std"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{autoencoder} is not a trained autoencoder: {error}") from error
    return Latent(channels=len(mean), height=1, width=1, mean=mean, std=std)


def autoencoder_downscale(autoencoder: Path) -> int:
    """Return the pixels per latent, along each side."""
    return read_autoencoder_config(autoencoder).downscale

"""Pictures to normalised latents, once, before training."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.autoencoder import Codec
from model.device import best_device
from model.errors import DataError
from model.manifest import Latent
from model.training.progress import progress_bar


def encode_pictures(images: np.ndarray, autoencoder: Path, cache: Path | None = None) -> Tensor:
    """``(n, height, width, 3)`` uint8 → latents ``(n, c, h, w)``, zero mean and unit deviation per channel.

    With ``cache``, a folder, they are kept there for the next run on the same pictures and autoencoder.
    """
    scale = latent_scale(autoencoder)
    if cache is None:
        return _encode(images, autoencoder, scale)
    digest = hashlib.sha256(images.tobytes())
    for file in sorted(path for path in autoencoder.iterdir() if path.is_file()):
        digest.update(file.read_bytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_file(path)["latents"]
    latents = _encode(images, autoencoder, scale)
    cache.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    return latents


def _encode(images: np.ndarray, autoencoder: Path, scale: Latent) -> Tensor:
    # Only the scale matters to the codec; sides are the bundle's concern.
    codec = Codec(autoencoder, scale, best_device())
    parts = torch.from_numpy(images).split(64)
    with progress_bar() as bar:
        return torch.cat([codec.encode(part).cpu() for part in bar.track(parts, description="latents")]).contiguous()


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

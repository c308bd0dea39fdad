"""Pictures to normalised latents, once, before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from model.device import best_device
from model.training.autoencoder import to_signed


@torch.inference_mode()
def encode_pictures(images: np.ndarray, autoencoder: Path) -> Tensor:
    """``(n, h, w, 3)`` uint8 → latents ``(n, c, h/4, w/4)``, zero mean and unit deviation per channel."""
    device = best_device()
    network = AutoencoderTiny.from_pretrained(autoencoder, local_files_only=True).eval().to(device)
    mean, std = latent_scale(autoencoder)
    latents = [
        (network.encode(to_signed(chunk).to(device)).latents.cpu() - mean) / std
        for chunk in torch.from_numpy(images).split(64)
    ]
    return torch.cat(latents)


def latent_scale(autoencoder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation per latent channel, ``(1, c, 1, 1)`` each, as measured when it was trained."""
    figures = json.loads((autoencoder / "latents.json").read_text())
    mean, std = (torch.tensor(figures[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return mean, std

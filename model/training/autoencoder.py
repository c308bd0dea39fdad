"""Training of the small picture autoencoder: `diffusers.AutoencoderTiny`, f4, four latent channels."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from model.device import best_device, training_autocast
from model.training.data import Pictures
from model.training.progress import progress_bar


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Sizes and rates; the defaults reach 28 dB on emoji in minutes on two cores."""

    width: int = 48
    latent_channels: int = 4
    batch: int = 24
    learning_rate: float = 2e-3
    latent_noise: float = 0.05
    latent_penalty: float = 1e-4
    steps: int = 5000
    seed: int = 0


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderTiny:
    """An untrained f4 autoencoder: pictures ``(b, 3, h, w)`` in [-1, 1] ↔ latents ``(b, c, h/4, w/4)``."""
    widths = (recipe.width,) * 3
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=recipe.latent_channels,
    )


def train_autoencoder(pictures: Pictures, out: Path, recipe: AutoencoderRecipe, minutes: float | None = None) -> float:
    """Train, then save to ``out`` in the diffusers format with the latent statistics beside it.

    Stops at ``recipe.steps`` or after ``minutes``; the learning rate follows whichever comes first.
    Returns the PSNR in dB on the held-out pictures.
    """
    torch.manual_seed(recipe.seed)
    device = best_device()
    network = build_autoencoder(recipe).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    held_out = pictures.held_out()
    train = torch.from_numpy(pictures.images[~held_out])
    weights = torch.from_numpy(pictures.weights[~held_out]).double()
    generator = torch.Generator().manual_seed(recipe.seed)
    started, steps = time.monotonic(), 0
    with progress_bar() as bar:
        task = bar.add_task("autoencoder", total=recipe.steps, note="")
        for step in range(recipe.steps):
            spent = (time.monotonic() - started) / 60 / minutes if minutes else 0.0
            done = max(step / recipe.steps, spent)
            if done >= 1:
                break
            steps = step + 1
            warm_up = min(1.0, (step + 1) / 100)
            optimiser.param_groups[0]["lr"] = recipe.learning_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * done))
            picked = torch.multinomial(weights, recipe.batch, replacement=True, generator=generator)
            batch = to_signed(train[picked]).to(device, memory_format=torch.channels_last)
            with training_autocast(device):
                latents = network.encode(batch).latents
                noisy = latents + recipe.latent_noise * torch.randn_like(latents)
                restored = network.decode(noisy).sample
            loss = (
                reconstruction_loss(restored.float(), batch) + recipe.latent_penalty * latents.float().square().mean()
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            bar.update(task, advance=1, note=f"loss {loss.item():.4f}")
    network.half().float().eval()  # stored in half precision, so measured in it
    psnr = reconstruction_psnr(network, pictures.images[held_out])
    mean, std = latent_statistics(network, pictures.images[~held_out])
    network.half().save_pretrained(out)
    figures = {"mean": mean.tolist(), "std": std.tolist(), "held_out_psnr_db": round(psnr, 2), "steps": steps}
    (out / "latents.json").write_text(json.dumps(figures, indent=2) + "\n")
    return psnr


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """``(b, h, w, 3)`` uint8 → ``(b, 3, h, w)`` float in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + half the L1 of the picture gradients, which keeps outlines sharp."""
    error = restored - target
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * gradients


@torch.inference_mode()
def reconstruction_psnr(network: AutoencoderTiny, images: np.ndarray) -> float:
    """Mean PSNR in dB over ``images`` ``(n, h, w, 3)`` uint8, each picture counted alike."""
    device = next(network.parameters()).device
    total = 0.0
    for chunk in torch.from_numpy(images).split(64):
        target = to_signed(chunk).to(device)
        restored = network.decode(network.encode(target).latents).sample.clamp(-1, 1)
        error = F.mse_loss(restored, target, reduction="none").mean(dim=(1, 2, 3))
        total += (10 * torch.log10(4 / error)).sum().item()
    return total / len(images)


@torch.inference_mode()
def latent_statistics(
    network: AutoencoderTiny, images: np.ndarray, sample: int = 2048
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per latent channel, ``(c,)`` each, over an even sample of ``images``."""
    device = next(network.parameters()).device
    chosen = torch.from_numpy(images[:: max(1, len(images) // sample)])
    latents = torch.cat([network.encode(to_signed(chunk).to(device)).latents.cpu() for chunk in chosen.split(64)])
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))

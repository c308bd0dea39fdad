"""Pixels ↔ latents, by a diffusers autoencoder and the bundle's latent statistics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.autoencoder_config import AutoencoderConfig
from model.bundle import AUTOENCODER_WEIGHTS, read_autoencoder_config
from model.device import upload
from model.errors import BundleError
from model.manifest import Latent
from model.weights import check_shapes, load_weights

ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of an AutoencoderKL's attention, as older files (Stable Diffusion 1 and 2) have them and as they are today."""
OLD_ATTENTION = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\.")


class Codec:
    """Encodes pictures to the latents a network sees, and decodes them again."""

    def __init__(self, folder: Path, latent: Latent, device: torch.device) -> None:
        """Load ``folder``, in the diffusers format.

        Raises:
            BundleError: the configuration is refused, or the weights are not exactly what it describes.
        """
        self.network = _load(folder).to(device, memory_format=torch.channels_last)
        self.device = device
        self.mean, self.std = (upload(torch.tensor(v), device).view(-1, 1, 1) for v in (latent.mean, latent.std))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """``(b, height, width, 3)`` uint8 → ``(b, c, h, w)``, normalised."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = self.network.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - self.mean) / self.std

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised ``(b, c, h, w)`` → ``(b, height, width, 3)`` uint8, on the CPU.

        There each picture is decoded by itself: convolutions of one and of several run in different kernels, and what a
        picture looks like shall not depend on what is decoded with it. It takes a tenth longer at most.
        """
        raw = (latents * self.std + self.mean).contiguous(memory_format=torch.channels_last)
        portions = raw.split(1) if self.device.type == "cpu" else [raw]
        pixels = torch.cat([self.network.decode(each).sample for each in portions])
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu()


def _load(folder: Path) -> Any:
    """The network in ``folder``, float32. Laid out without memory, so that it takes no more than its weights' file."""
    path = folder / AUTOENCODER_WEIGHTS
    network = _lay_out(folder, read_autoencoder_config(folder))
    weights = {OLD_ATTENTION.sub(_present_name, name): each for name, each in load_weights(path).items()}
    found, expected = ({name: tuple(each.shape) for name, each in s.items()} for s in (weights, network.state_dict()))
    check_shapes(str(path), found, expected)
    # Copies: what was read is still mapped, and who replaced the file would pull it from under a running worker.
    copies = {name: each.to(torch.float32, copy=True) for name, each in weights.items()}
    network.load_state_dict(copies, assign=True)
    return network.eval()


def _lay_out(folder: Path, config: AutoencoderConfig) -> Any:
    """The network a config describes, on the meta device."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return getattr(diffusers, config.class_name)(**config.arguments)
    except Exception as error:  # whatever else the library finds to say against a config that looked sound
        raise BundleError(f"{folder}: the autoencoder cannot be built: {error!r:.300}") from error


def _present_name(old: re.Match[str]) -> str:
    return f"{old[1]}.{ATTENTION_NAMES[old[2]]}."

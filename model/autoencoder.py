"""Pixels ↔ latents, by a diffusers autoencoder and the bundle's latent statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.errors import BundleError
from model.manifest import Latent
from model.weights import check_finite


class Codec:
    """Encodes pictures to the latents a network sees, and decodes them again."""

    def __init__(self, folder: Path, class_name: str, latent: Latent, device: torch.device) -> None:
        """Load ``folder``, in the diffusers format; ``class_name`` is AutoencoderKL or AutoencoderTiny.

        Raises:
            BundleError: the weights cannot be loaded.
        """
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        try:
            loaded, found = getattr(diffusers, class_name).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BundleError(f"{folder}: the autoencoder cannot be loaded: {error}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := [str(name) for name in found[what]]:
                # The library would fill the gaps with random numbers.
                raise BundleError(f"{folder}: {len(names)} {what.replace('_', ' ')}, such as {names[0]}")
        # The library leaves the file mapped into memory: who replaced it would pull it from under a running worker.
        weights = {name: check_finite(str(folder), name, each).clone() for name, each in loaded.state_dict().items()}
        loaded.load_state_dict(weights, assign=True)
        self.network = loaded.eval().float().to(device, memory_format=torch.channels_last)
        self.device = device
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (latent.mean, latent.std))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """``(b, height, width, 3)`` uint8 → ``(b, c, h, w)``, normalised."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = self.network.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - self.mean) / self.std

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised ``(b, c, h, w)`` → ``(b, height, width, 3)`` uint8, on the CPU."""
        raw = (latents * self.std + self.mean).contiguous(memory_format=torch.channels_last)
        pixels = self.network.decode(raw).sample
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu()

"""Pixels ↔ latents, with a diffusers autoencoder and the bundle's latent statistics."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model import parallel
from patchforge.model.device import upload
from patchforge.model.errors import BundleError
from patchforge.model.preview import PreviewDecoder
from patchforge.model.storage.autoencoder_config import AutoencoderConfig, Flux2Config, TinyConfig
from patchforge.model.storage.bundle import (
    AUTOENCODER_COUNTER,
    AUTOENCODER_PREVIEW,
    AUTOENCODER_WEIGHTS,
    load_autoencoder_weights,
    read_autoencoder_config,
)
from patchforge.model.storage.manifest import Latent
from patchforge.model.storage.weights import check_shapes, load_weights

ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Weight names in an AutoencoderKL's attention: in older files (Stable Diffusion 1 and 2) → today."""
TILE = 128
"""Latents along a side of the largest part of a picture that is decoded at once. At 1024 pixels it takes gigabytes."""
OLD_ATTENTION = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\.")


class Codec:
    """Encodes pictures to the network's latents, and decodes latents to pictures."""

    def __init__(self, folder: Path, latent: Latent, device: torch.device) -> None:
        """Load the autoencoder in `folder`, in diffusers format.

        Raises:
            BundleError: the config is refused, or the weights do not match it exactly.
        """
        config = read_autoencoder_config(folder)
        self.fold = config.fold
        self.network = _load_network(folder, config).to(device, memory_format=torch.channels_last)
        self.previewer = _load_preview(folder, latent.channels)
        if self.previewer is not None:
            self.previewer.to(device)
        self.device = device
        self._kind = object()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (latent.mean, latent.std))
        if isinstance(config, Flux2Config):
            mean, std = _join_batch_norm(self.network.bn, mean, std)
        self.mean, self.std = upload(mean, device), upload(std, device)
        """`(c, 1, 1)`, or `(c, 2, 2)` where they differ within cells of 2×2 latents."""
        _tile(self.network, config)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures `(b, height, width, 3)` uint8 → normalised latents `(b, c, h, w)`."""
        [latents] = parallel.crew(self.device).run([partial(self._encode, images)])
        return latents

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = self.network.encode(F.pixel_unshuffle(pixels, self.fold))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - self._spread(self.mean, latents)) / self._spread(self.std, latents)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents `(b, c, h, w)` → pictures `(b, height, width, 3)` uint8, on the CPU.

        If the autoencoder runs on the CPU, it decodes one picture at a time: convolutions of several pictures use
        other kernels, and a picture must not depend on what is decoded with it. This takes at most a tenth longer.
        """
        return self._run(self._decode, latents)

    def preview(self, latents: Tensor) -> Tensor | None:
        """Normalised latents `(b, c, h, w)` → small pictures `(b, 4·h, 4·w, 3)` uint8, on the CPU.

        This costs a small part of `decode`. None if the autoencoder has no preview decoder.
        """
        return None if self.previewer is None else self._run(self._preview, latents)

    def _spread(self, values: Tensor, latents: Tensor) -> Tensor:
        """Repeat values of one cell `(c, k, k)` for each cell of latents `(b, c, h, w)`, where cells are not single."""
        rows, columns = values.shape[-2:]
        return values if rows == 1 else values.repeat(1, latents.shape[-2] // rows, latents.shape[-1] // columns)

    def _run(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        raw = latents * self._spread(self.std, latents) + self._spread(self.mean, latents)
        raw = raw.contiguous(memory_format=torch.channels_last)
        crew = parallel.crew(self.device)
        calls = [partial(self._decode_portions, decode, part) for part in raw.chunk(crew.parts)]
        pixels = torch.cat(crew.run(calls, kind=(self._kind, decode.__name__, raw.shape)))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu()

    @torch.inference_mode()
    def _decode_portions(self, decode: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
        portions = raw.split(1) if self.device.type == "cpu" else [raw]
        return torch.cat([decode(each) for each in portions])

    def _decode(self, raw: Tensor) -> Tensor:
        return F.pixel_shuffle(self.network.decode(raw).sample, self.fold)

    def _preview(self, raw: Tensor) -> Tensor:
        assert self.previewer is not None
        pixels: Tensor = self.previewer(raw)
        return pixels


def _join_batch_norm(norm: torch.nn.BatchNorm2d, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Put the statistics that an autoencoder holds before those of the bundle, `(c, 1, 1)`: returns two `(c, 2, 2)`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own_mean, own_std = (
        values.cpu().unflatten(0, (-1, 2, 2)) for values in (norm.running_mean, (norm.running_var + norm.eps).sqrt())
    )
    return own_mean + own_std * mean, own_std * std


def _tile(network: Any, config: AutoencoderConfig) -> None:
    """Let the library work on pictures of more than `TILE` latents along a side in tiles, which overlap.

    Not so an AutoencoderTiny: it needs little memory, and the library's tiles are only for 4 latents of 8×8 pixels.
    """
    if isinstance(config, TinyConfig):
        return
    network.enable_tiling()
    network.tile_latent_min_size = TILE
    network.tile_sample_min_size = TILE * config.downscale


def _load_preview(folder: Path, channels: int) -> PreviewDecoder | None:
    path = folder / AUTOENCODER_PREVIEW
    if not path.is_file():
        return None
    network = PreviewDecoder(channels)
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    network.load_state_dict(load_weights(path, shapes, dtype=torch.float32))
    return network.eval()


def _load_network(folder: Path, config: AutoencoderConfig) -> Any:
    """Load the network in `folder`, in float32. It is built without memory, so it needs only that of its weights."""
    path = folder / AUTOENCODER_WEIGHTS
    network = _build_network(folder, config)
    stored = load_autoencoder_weights(folder)
    weights = {OLD_ATTENTION.sub(_modernise_name, name): each for name, each in stored.items()}
    found, expected = ({name: tuple(each.shape) for name, each in s.items()} for s in (weights, network.state_dict()))
    expected.pop(AUTOENCODER_COUNTER, None)
    check_shapes(str(path), found, expected)
    weights = {name: each.to(torch.float32) for name, each in weights.items()}
    if AUTOENCODER_COUNTER in network.state_dict():
        weights[AUTOENCODER_COUNTER] = torch.tensor(0)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _build_network(folder: Path, config: AutoencoderConfig) -> Any:
    """Build the network that a config describes, on the meta device."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return getattr(diffusers, config.class_name)(**config.arguments)
    except Exception as error:  # the library may still refuse a config that passed our checks
        raise BundleError(f"{folder}: the autoencoder cannot be built: {error!r:.300}") from error


def _modernise_name(old: re.Match[str]) -> str:
    return f"{old[1]}.{ATTENTION_NAMES[old[2]]}."

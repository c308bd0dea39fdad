"""The judge: a small classifier of training pictures. Its features and scores measure generated pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchforge.model.device import best_device
from patchforge.model.errors import DataError
from patchforge.model.networks.text_encoder import MiniLM
from patchforge.model.storage.weights import load_weights
from patchforge.model.training.data import Pictures

SHIPPED = Path(__file__).parent / "emoji_judge"
WIDTHS = (32, 64, 128, 256)
FEATURES = 128
MAX_TOKENS = 24
TEXT_SCALE = 10.0
"""Factor of the logits that compare a picture with texts of unit length."""


class JudgeNetwork(nn.Module):
    """Convolutions, a mean over the picture, `FEATURES` features, and linear heads for class, style and text."""

    def __init__(self, classes: int, styles: int) -> None:
        super().__init__()
        narrow, *wider = WIDTHS
        layers: list[nn.Module] = [*_layer(3, narrow, stride=2)]
        for before, after in zip(WIDTHS, wider, strict=False):
            layers += [*_layer(before, after, stride=2), *_layer(after, after)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], FEATURES))
        self.classes = nn.Linear(FEATURES, classes)
        self.styles = nn.Linear(FEATURES, styles)
        self.text = nn.Linear(FEATURES, MiniLM.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(b, 3, height, width)` in [-1, 1] → features `(b, FEATURES)`."""
        features: Tensor = self.trunk(pixels)
        return F.silu(features)

    def text_logits(self, features: Tensor, texts: Tensor) -> Tensor:
        """Features `(b, FEATURES)` and texts `(m, width)` from `Judge.embed` → logits `(b, m)`."""
        return TEXT_SCALE * F.normalize(self.text(features), dim=-1) @ texts.T


def on_device(network: JudgeNetwork) -> JudgeNetwork:
    """Move the network to the best device, in the memory format that is fastest for convolutions."""
    network = network.to(best_device())
    torch.nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    return network


def _layer(before: int, after: int, stride: int = 1) -> Iterator[nn.Module]:
    yield nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    yield nn.BatchNorm2d(after)
    yield nn.ReLU(inplace=True)


@dataclass(frozen=True)
class Judge:
    """A trained judge. Pictures are `(n, height, width, 3)` uint8. Results are float32 on the CPU."""

    network: JudgeNetwork
    class_names: tuple[str, ...]
    styles: tuple[str, ...]
    text_mean: Tensor
    """`(width,)`: the mean of all captions. It is subtracted before texts are compared."""
    record: dict[str, Any]
    """How it was trained, and its accuracy on real pictures that it has not seen."""

    @classmethod
    def load(cls, folder: Path = SHIPPED) -> Self:
        """Read a judge that `save_judge` wrote; without a folder, the shipped judge of emoji.

        Raises:
            DataError: the folder holds no judge.
            BundleError: the judge's weights are damaged.
        """
        try:
            record = json.loads((folder / "judge.json").read_text())
            names, styles = tuple(record["class_names"]), tuple(record["styles"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a judge made by `patchforge train judge`: {error}") from error
        network = JudgeNetwork(len(names), len(styles))
        shapes = {name: tuple(each.shape) for name, each in network.state_dict().items() if each.ndim}
        weights = load_weights(folder / "model.safetensors", shapes | {"text_mean": (MiniLM.width,)})
        text_mean = weights.pop("text_mean").float()
        network.load_state_dict(weights, strict=False)  # the norms' batch counters are not stored
        return cls(on_device(network.float().eval()), names, styles, text_mean, record)

    @property
    def summary(self) -> dict[str, Any]:
        """Identifies this judge in the record of a measurement."""
        return {key: self.record[key] for key in ("created", "table_sha256", "accuracy") if key in self.record}

    @torch.inference_mode()
    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Compute features, `(n, FEATURES)`, for Fréchet distance, precision and recall."""
        device, size = self.network.text.weight.device, self.record.get("recipe", {}).get("size", 64)
        parts = torch.as_tensor(images).split(128)
        return torch.cat([self.network(shrink(to_pixels(part), size).to(device)).float().cpu() for part in parts])

    @torch.inference_mode()
    def class_scores(self, features: Tensor) -> Tensor:
        """Features → class logits `(n, classes)`, in the order of `class_names`."""
        return self.network.classes(features.to(self.network.text.weight.device)).cpu()

    @torch.inference_mode()
    def style_scores(self, features: Tensor) -> Tensor:
        """Features → style logits `(n, styles)`, in the order of `styles`."""
        return self.network.styles(features.to(self.network.text.weight.device)).cpu()

    @torch.inference_mode()
    def text_scores(self, features: Tensor, texts: Tensor) -> Tensor:
        """Features of n pictures and m texts from `embed` → how well each picture shows each text, `(n, m)`."""
        device = self.network.text.weight.device
        return self.network.text_logits(features.to(device), texts.to(device)).cpu()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts as vectors of unit length, `(m, width)`. A style word at the end is left out."""
        return centred(sentences(self._encoder, [self.without_style(prompt) for prompt in prompts]), self.text_mean)

    def without_style(self, prompt: str) -> str:
        """Remove the style word: `red apple, 3d` → `red apple`."""
        name, comma, last = prompt.rpartition(",")
        return name if comma and last.strip() in self.styles else prompt

    @cached_property
    def _encoder(self) -> MiniLM:
        return MiniLM(MAX_TOKENS)


def sentences(encoder: MiniLM, texts: Sequence[str]) -> Tensor:
    """Embed texts as MiniLM was trained for: mean over tokens, unit length, `(m, width)`."""
    parts = []
    for start in range(0, len(texts), 256):
        encoded = encoder.encode(texts[start : start + 256])
        parts.append(encoded.states.sum(dim=1) / encoded.mask.sum(dim=1, keepdim=True))
    return F.normalize(torch.cat(parts).cpu(), dim=-1)


def centred(texts: Tensor, mean: Tensor) -> Tensor:
    """Subtract the mean of all captions, and scale to unit length again."""
    return F.normalize(texts - mean, dim=-1)


def to_pixels(images: Tensor) -> Tensor:
    """`(n, height, width, 3)` uint8 → `(n, 3, height, width)` in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def shrink(pixels: Tensor, size: int) -> Tensor:
    """Shrink pixels `(b, 3, height, width)` to `size` on a side, by means; leave smaller pictures as they are."""
    return F.interpolate(pixels, (size, size), mode="area") if pixels.shape[-1] > size else pixels


def unseen(pictures: Pictures, share: float = 0.06) -> np.ndarray:
    """Select pictures of known concepts that no judge is trained on, to measure the judge itself: boolean mask `(n,)`.

    All skin tones of a concept in one style are on the same side; other styles of the concept may be trained on.
    """
    keys = (f"{concept}|{style}" for concept, style in zip(pictures.concepts, pictures.styles, strict=True))
    scores = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32 for key in keys])
    return (scores < share) & ~pictures.held_out()

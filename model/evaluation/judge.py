"""The judge: a small classifier of the training pictures, whose features and scores measure generated ones."""

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

from model.device import best_device
from model.errors import DataError
from model.text import MiniLM
from model.training.data import Pictures
from model.weights import load_weights

SHIPPED = Path(__file__).parent / "emoji_judge"
WIDTHS = (32, 64, 128, 256)
FEATURES = 128
MAX_TOKENS = 24
TEXT_SCALE = 10.0
"""Of the logits that compare a picture with texts of unit length."""


class JudgeNetwork(nn.Module):
    """Convolutions, a mean over the picture, `FEATURES` features, and a linear head each for class, style and text."""

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
        """``(b, 3, height, width)`` in [-1, 1] → features ``(b, FEATURES)``."""
        features: Tensor = self.trunk(pixels)
        return F.silu(features)

    def text_logits(self, features: Tensor, texts: Tensor) -> Tensor:
        """``(b, FEATURES)``, texts ``(m, width)`` as `Judge.embed` makes them → ``(b, m)``."""
        return TEXT_SCALE * F.normalize(self.text(features), dim=-1) @ texts.T


def on_device(network: JudgeNetwork) -> JudgeNetwork:
    """On the best device, laid out as its convolutions like it."""
    network = network.to(best_device())
    torch.nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    return network


def _layer(before: int, after: int, stride: int = 1) -> Iterator[nn.Module]:
    yield nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    yield nn.BatchNorm2d(after)
    yield nn.ReLU(inplace=True)


@dataclass(frozen=True)
class Judge:
    """A trained judge. Pictures are ``(n, height, width, 3)`` uint8; answers are float32 on the CPU."""

    network: JudgeNetwork
    class_names: tuple[str, ...]
    styles: tuple[str, ...]
    text_mean: Tensor
    """``(width,)``: what all captions share, taken off before texts are compared."""
    record: dict[str, Any]
    """How it was trained, and how well it does on real pictures that it has not seen."""

    @classmethod
    def load(cls, folder: Path = SHIPPED) -> Self:
        """Read what `save_judge` wrote; without a folder, the judge of emoji that is shipped.

        Raises:
            DataError: the folder holds no judge. BundleError: its weights are damaged.
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
        network.load_state_dict(weights, strict=False)  # the batch counters of the norms are not kept
        return cls(on_device(network.float().eval()), names, styles, text_mean, record)

    @property
    def summary(self) -> dict[str, Any]:
        """Which judge this is, for the record of what it measured."""
        return {key: self.record[key] for key in ("created", "table_sha256", "accuracy") if key in self.record}

    @torch.inference_mode()
    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """``(n, FEATURES)``: what Fréchet distance, precision and recall are measured in."""
        device = self.network.text.weight.device
        parts = torch.as_tensor(images).split(128)
        return torch.cat([self.network(to_pixels(part).to(device)).float().cpu() for part in parts])

    @torch.inference_mode()
    def class_scores(self, features: Tensor) -> Tensor:
        """`features` → ``(n, classes)`` logits, in the order of ``class_names``."""
        return self.network.classes(features.to(self.network.text.weight.device)).cpu()

    @torch.inference_mode()
    def style_scores(self, features: Tensor) -> Tensor:
        """`features` → ``(n, styles)`` logits, in the order of ``styles``."""
        return self.network.styles(features.to(self.network.text.weight.device)).cpu()

    @torch.inference_mode()
    def prompt_scores(self, images: np.ndarray | Tensor, prompts: Sequence[str]) -> Tensor:
        """``(n, m)``: how well each picture shows what each prompt names; a style word at its end is left out."""
        return self.text_scores(self.features(images), self.embed(prompts))

    @torch.inference_mode()
    def text_scores(self, features: Tensor, texts: Tensor) -> Tensor:
        """`features` and texts as `embed` makes them → ``(n, m)``."""
        device = self.network.text.weight.device
        return self.network.text_logits(features.to(device), texts.to(device)).cpu()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """``(m, width)`` of unit length."""
        return centred(sentences(self._encoder, [self.without_style(prompt) for prompt in prompts]), self.text_mean)

    def without_style(self, prompt: str) -> str:
        """``red apple, 3d`` → ``red apple``."""
        name, comma, last = prompt.rpartition(",")
        return name if comma and last.strip() in self.styles else prompt

    @cached_property
    def _encoder(self) -> MiniLM:
        return MiniLM(MAX_TOKENS)


def sentences(encoder: MiniLM, texts: Sequence[str]) -> Tensor:
    """``(m, width)``: the mean over tokens, of unit length, as MiniLM was trained to be compared."""
    parts = []
    for start in range(0, len(texts), 256):
        encoded = encoder.encode(texts[start : start + 256])
        parts.append(encoded.states.sum(dim=1) / encoded.mask.sum(dim=1, keepdim=True))
    return F.normalize(torch.cat(parts).cpu(), dim=-1)


def centred(texts: Tensor, mean: Tensor) -> Tensor:
    """Without what all captions share, of unit length again."""
    return F.normalize(texts - mean, dim=-1)


def to_pixels(images: Tensor) -> Tensor:
    """``(n, height, width, 3)`` uint8 → ``(n, 3, height, width)`` in [-1, 1]."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def unseen(pictures: Pictures, share: float = 0.06) -> np.ndarray:
    """Boolean mask ``(n,)``: pictures of known concepts that no judge is trained on, so that it can be judged itself.

    All skin tones of a concept in one style fall on the same side; the concept's other styles may be trained on.
    """
    keys = (f"{concept}|{style}" for concept, style in zip(pictures.concepts, pictures.styles, strict=True))
    scores = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32 for key in keys])
    return (scores < share) & ~pictures.held_out()

"""Conditions of training batches: classes or encoded captions, with dropout for guidance."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchforge.model.networks.attention import Layout
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.text_encoder import MiniLM
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.training.data import Pictures, phrasings
from patchforge.model.training.progress import progress_bar

DROPOUT = 0.1
PLAIN = 0.15
"""Share of captions without their style word. Without it a picture of any style is right, which teaches less."""


class Conditions(Protocol):
    """Runs the network on a batch of pictures, each with its own condition."""

    def predict(self, network: Any, picked: np.ndarray, noisy: Tensor, times: Tensor, drop: float) -> Tensor:
        """Compute the network's output `(b·P, out)` for the pictures with indices `picked` `(b,)`.

        `noisy` is `(b, P, D)`, `times` is `(b, P)`. Each condition is dropped with probability `drop`.
        """
        ...


class ClassConditions:
    """One label per picture. Dropped labels become the null class."""

    def __init__(self, pictures: Pictures) -> None:
        self.labels = torch.from_numpy(pictures.classes).long()

    def predict(self, network: PFT, picked: np.ndarray, noisy: Tensor, times: Tensor, drop: float) -> Tensor:
        batch, patches = times.shape
        labels = self.labels[picked]
        labels = torch.where(torch.rand(batch) < drop, network.null_class, labels).to(noisy.device)
        layout = Layout.dense(batch, patches, noisy.device)
        each = labels.repeat_interleave(patches)
        out: Tensor = network(noisy.flatten(0, 1), times.flatten(), each, None, layout)
        return out


class TextConditions:
    """One of a picture's captions, drawn at random and encoded beforehand. Dropped captions become the empty text."""

    def __init__(self, pictures: Pictures, max_tokens: int, cache: Path) -> None:
        listed = [phrasings(names, style) for names, style in zip(pictures.captions, pictures.styles, strict=True)]
        phrases = ["", *dict.fromkeys(phrase for each in listed for pair in each for phrase in pair)]
        index = {phrase: i for i, phrase in enumerate(phrases)}
        self.choices = [[(index[styled], index[plain]) for styled, plain in each] for each in listed]
        self.states, self.mask = encode_phrases(phrases, max_tokens, cache)

    def predict(self, network: TextPFT, picked: np.ndarray, noisy: Tensor, times: Tensor, drop: float) -> Tensor:
        batch, patches = times.shape
        # From torch's own generator, because its state is saved with the run.
        draws, plain = torch.rand(batch).tolist(), (torch.rand(batch) < PLAIN).tolist()
        choices = (self.choices[i] for i in picked)
        chosen = torch.tensor([each[int(u * len(each))][p] for u, p, each in zip(draws, plain, choices, strict=True)])
        chosen[torch.rand(batch) < drop] = 0
        mask = self.mask[chosen]
        tokens = int(mask.sum(dim=1).max())  # all rows have only padding after this
        mask = mask[:, :tokens].to(noisy.device)
        text = self.states[chosen, :tokens].to(noisy.device).float()
        layout = Layout.dense(batch, patches, noisy.device, network.refine(text, mask))
        out: Tensor = network(noisy.flatten(0, 1), times.flatten(), None, layout)
        return out


def encode_phrases(phrases: list[str], max_tokens: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Encode phrases to states `(n, max_tokens, width)` float16 and masks `(n, max_tokens)`, and cache both."""
    digest = hashlib.sha256("\n".join([str(max_tokens), *phrases]).encode()).hexdigest()[:16]
    path = cache / f"text-{digest}.safetensors"
    if path.exists():
        stored = load_file(path)
        return stored["states"], stored["mask"].bool()
    encoder = MiniLM(max_tokens)
    states, masks = [], []
    with progress_bar() as bar:
        for start in bar.track(range(0, len(phrases), 256), description="captions"):
            encoded = encoder.encode(phrases[start : start + 256])
            states.append(encoded.states.half())
            masks.append(encoded.mask)
    cache.mkdir(parents=True, exist_ok=True)
    found, mask = torch.cat(states), torch.cat(masks)
    partial = path.with_suffix(".partial")
    save_file({"states": found, "mask": mask.to(torch.uint8)}, partial)
    partial.replace(path)  # a killed run leaves no partial cache
    return found, mask

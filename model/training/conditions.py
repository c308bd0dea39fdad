"""What a training batch is conditioned on: classes, or encoded captions; with dropout for guidance."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention import Layout
from model.pft import PFT
from model.text import MiniLM
from model.text_pft import TextPFT
from model.training.data import Pictures, phrasings
from model.training.progress import progress_bar

DROPOUT = 0.1


class Conditions(Protocol):
    """Runs the network on a batch of pictures under their own conditions."""

    def predict(self, network: Any, picked: np.ndarray, noisy: Tensor, times: Tensor, drop: float) -> Tensor:
        """Network output ``(b·P, out)`` for pictures ``picked`` ``(b,)``.

        ``noisy`` is ``(b, P, D)``, ``times`` ``(b, P)``; each condition is dropped with probability ``drop``.
        """
        ...


class ClassConditions:
    """One label a picture; dropped ones become the null class."""

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
    """A caption drawn from a picture's phrasings, encoded beforehand; dropped ones become the empty text."""

    def __init__(self, pictures: Pictures, max_tokens: int, cache: Path) -> None:
        listed = [phrasings(names, style) for names, style in zip(pictures.captions, pictures.styles, strict=True)]
        phrases = ["", *dict.fromkeys(phrase for each in listed for phrase in each)]
        index = {phrase: i for i, phrase in enumerate(phrases)}
        self.choices = [[index[phrase] for phrase in each] for each in listed]
        self.states, self.mask = encode_phrases(phrases, max_tokens, cache)

    def predict(self, network: TextPFT, picked: np.ndarray, noisy: Tensor, times: Tensor, drop: float) -> Tensor:
        batch, patches = times.shape
        # From torch's own generator, whose state is saved with the run.
        draws = torch.rand(batch).tolist()
        chosen = torch.tensor(
            [
                choices[int(u * len(choices))]
                for u, choices in zip(draws, (self.choices[i] for i in picked), strict=True)
            ]
        )
        chosen[torch.rand(batch) < drop] = 0
        mask = self.mask[chosen]
        tokens = int(mask.sum(dim=1).max())  # the rest is padding in every row
        mask = mask[:, :tokens].to(noisy.device)
        text = self.states[chosen, :tokens].to(noisy.device).float()
        layout = Layout.dense(batch, patches, noisy.device, network.refine(text, mask))
        out: Tensor = network(noisy.flatten(0, 1), times.flatten(), None, layout)
        return out


def encode_phrases(phrases: list[str], max_tokens: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Encoder states ``(n, max_tokens, width)`` float16 and masks ``(n, max_tokens)``, kept in ``cache``."""
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
    partial.replace(path)  # a killed run leaves no half-written cache
    return found, mask

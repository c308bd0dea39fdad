"""How training draws the timestep of each patch (spec §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LTG:
    """Logit-normal maximum, truncated Gaussian below it: bounds the information of every training sample.

    ``together`` is the share of samples whose patches all stand at the maximum, as in uniform sampling;
    ``clean`` the share of samples of which some patches are shown fully clean, so that regions which finished
    early are in distribution. Both are ours; at 0 this is the paper's sampler.
    """

    loc: float = 0.7
    scale: float = 1.0
    std: float = 0.6
    together: float = 0.0
    clean: float = 0.0

    def sample(self, batch: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps ``(batch, patches)`` in [0, 1]."""
        t_max = torch.sigmoid(self.loc + self.scale * torch.randn(batch, 1, generator=generator))
        spread = (t_max / 2).clamp(max=self.std)
        times = t_max - torch.randn(batch, patches, generator=generator).abs() * spread
        again = torch.rand(batch, patches, generator=generator) * t_max
        times = torch.where(times < 0, again, times)
        if self.together:
            alike = torch.rand(batch, 1, generator=generator) < self.together
            times = torch.where(alike, t_max.expand_as(times), times)
        if self.clean:
            # A sample has either no clean patch or a random share of them.
            share = torch.rand(batch, 1, generator=generator)
            chosen = torch.rand(batch, 1, generator=generator) < self.clean
            shown = chosen & (torch.rand(batch, patches, generator=generator) < share)
            times = torch.where(shown, torch.ones(()), times)
        return times

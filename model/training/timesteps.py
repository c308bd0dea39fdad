"""How training draws the timestep of each patch (spec §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LTG:
    """Logit-normal maximum, truncated Gaussian below it: limits the information in every training sample.

    `together` is the share of samples whose patches all have the maximum, as in uniform sampling. `clean` is the share
    of samples with some fully clean patches, so that the network knows regions that finished early. Both are our
    additions; at 0, this is the paper's sampler.
    """

    loc: float = 0.7
    scale: float = 1.0
    std: float = 0.6
    together: float = 0.0
    clean: float = 0.0

    def sample(self, batch: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps `(batch, patches)` in [0, 1]."""
        t_max = _logit_normal(batch, self.loc, self.scale, generator)
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


@dataclass(frozen=True)
class OneTime:
    """One logit-normal timestep for all patches of a sample: usual flow matching (SiT)."""

    loc: float = 0.0
    scale: float = 1.0

    def sample(self, batch: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps `(batch, patches)` in [0, 1]."""
        return _logit_normal(batch, self.loc, self.scale, generator).repeat(1, patches)


@dataclass(frozen=True)
class UniformEach:
    """A uniform timestep for each patch. With this naive way, nearly every sample has some almost clean patch."""

    def sample(self, batch: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps `(batch, patches)` in [0, 1]."""
        return torch.rand(batch, patches, generator=generator)


@dataclass(frozen=True)
class MeanControlled:
    """Logit-normal mean, and patches uniform around it, as widely as [0, 1] allows.

    It fixes how much a sample shows on average, but not how much its clearest patch shows, as `LTG` does.
    """

    loc: float = 0.0
    scale: float = 1.0

    def sample(self, batch: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps `(batch, patches)` in [0, 1]."""
        mean = _logit_normal(batch, self.loc, self.scale, generator)
        reach = torch.minimum(mean, 1 - mean)
        return mean + (2 * torch.rand(batch, patches, generator=generator) - 1) * reach


Schedule = LTG | OneTime | UniformEach | MeanControlled

SCHEDULES: dict[str, Schedule] = {
    "mixed": LTG(loc=0.5, together=0.25, clean=0.15),
    "noisy": LTG(loc=-0.8, together=0.25, clean=0.15),
    "noisiest": LTG(loc=-1.6, scale=1.2, together=0.25, clean=0.15),
    "wide": LTG(loc=-0.8, scale=1.6, together=0.25, clean=0.15),
    "ltg": LTG(),
    "sit": OneTime(),
    "uniform": UniformEach(),
    "mean": MeanControlled(),
}
"""By name: our first one, for latents of 64 pixels; the one for larger latents, where the same noise hides less; the
one that learns captions fastest, and the one to end with, which leaves nothing out; the paper's for classes; and the
schedules that it is compared with."""


def _logit_normal(batch: int, loc: float, scale: float, generator: torch.Generator | None) -> Tensor:
    """`(batch, 1)`."""
    return torch.sigmoid(loc + scale * torch.randn(batch, 1, generator=generator))

"""The vocabulary that samplers, denoiser and networks share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Where log-variances are clamped, in training (spec §3) and sampling: its exponential stays finite."""


@dataclass(frozen=True)
class Grid:
    """How a latent ``(c, h, w)`` is cut into patches, row-major.

    Everywhere outside the autoencoder a latent is the matrix of its patches ``(P, D)``: one row a patch, its
    values laid out ``(row in patch, column in patch, channel)``, so ``D = size² · channels``.
    """

    rows: int
    columns: int
    size: int
    channels: int

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def values(self) -> int:
        """D, the number of values of one patch."""
        return self.size**2 * self.channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, h, w)``."""
        return self.channels, self.rows * self.size, self.columns * self.size

    def patchify(self, latents: Tensor) -> Tensor:
        """``(…, c, h, w)`` → ``(…, P, D)``."""
        lead = latents.shape[:-3]
        cells = latents.reshape(*lead, latents.shape[-3], self.rows, self.size, self.columns, self.size)
        return cells.movedim(-5, -1).transpose(-4, -3).reshape(*lead, self.patches, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """``(…, P, D)`` → ``(…, c, h, w)``; inverse of `patchify`, for any channel count."""
        lead = patches.shape[:-2]
        cells = patches.reshape(*lead, self.rows, self.columns, self.size, self.size, -1)
        rows, columns = self.rows * self.size, self.columns * self.size
        return cells.transpose(-4, -3).movedim(-1, -5).reshape(*lead, -1, rows, columns)


@dataclass(frozen=True)
class Plan:
    """What a sampler wants evaluated next. Times are Python floats, so planning costs no device sync."""

    latent: Tensor
    """``(P, D)``: the state, or a context the sampler made up (look-ahead)."""
    times: tuple[float, ...]
    """The distinct timesteps of the patches evaluated."""
    time_index: Tensor | None = None
    """``(a,)`` long: which of ``times`` each evaluated patch has; None: all have the first."""
    patches: Tensor | None = None
    """``(a,)`` long, ascending: the patches to evaluate; None: all of them."""
    guidance: float = 1.0
    """Classifier-free guidance scale; at 1 only the conditional branch runs."""
    null_index: Tensor | None = None
    """``(a_n,)`` long, ascending: which of the evaluated patches run in the null branch too; None: all of them."""
    keep: bool = False
    """Keep keys and values for later plans that evaluate only some patches."""
    drift: Tensor | None = None
    """``(2, P)``, null branch first: how far the kept keys and values of each patch are extrapolated, in units of
    what lay between its last two evaluations; None: not at all. 0 for patches that are evaluated."""

    @property
    def active(self) -> int:
        """How many patches are evaluated, a."""
        return self.latent.shape[0] if self.patches is None else self.patches.shape[0]


@dataclass(frozen=True)
class Prediction:
    """What the network says of the planned patches."""

    velocity: Tensor
    """``(a, D)``, guided where the null branch ran."""
    conditional: Tensor
    """``(a, D)``, of the conditional branch alone."""
    log_variance: Tensor
    """``(a, size²)``, guided."""
    null: Tensor | None = None
    """``(a_n, D)``, of the null branch alone, for the patches it ran for; None if it did not run."""
    conditional_log_variance: Tensor | None = None
    """``(a, size²)``, of the conditional branch alone; None where it is the same as the guided one."""

    @property
    def difficulty(self) -> Tensor:
        """``(a,)``: mean predicted variance over a patch's pixels (spec §6)."""
        return _variance(self.log_variance)

    @property
    def variance(self) -> Tensor:
        """``(a,)``: the same of the conditional branch alone, which is what training calibrates."""
        own = self.conditional_log_variance
        return _variance(self.log_variance if own is None else own)


def _variance(log_variance: Tensor) -> Tensor:
    return log_variance.clamp(*LOG_VARIANCE_RANGE).exp().mean(dim=-1)

"""Types that samplers, denoiser and networks share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this range, in training (spec §3) and sampling, so that `exp` stays finite."""


@dataclass(frozen=True)
class Grid:
    """How a latent `(c, h, w)` is cut into patches, in row-major order.

    Outside the autoencoder a latent is always the matrix of its patches `(P, D)`, with one row per patch. The values of
    a patch are in the order (row in patch, column in patch, channel), so `D = size² · channels`.
    """

    rows: int
    columns: int
    size: int
    channels: int

    @property
    def patches(self) -> int:
        """P, the number of patches."""
        return self.rows * self.columns

    @property
    def half(self) -> Grid:
        """The grid of a picture of half the size."""
        return replace(self, rows=self.rows // 2, columns=self.columns // 2)

    @property
    def values(self) -> int:
        """D, the number of values in one patch."""
        return self.size**2 * self.channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a latent, `(c, h, w)`."""
        return self.channels, self.rows * self.size, self.columns * self.size

    def patchify(self, latents: Tensor) -> Tensor:
        """`(…, c, h, w)` → `(…, P, D)`."""
        lead = latents.shape[:-3]
        cells = latents.reshape(*lead, latents.shape[-3], self.rows, self.size, self.columns, self.size)
        return cells.movedim(-5, -1).transpose(-4, -3).reshape(*lead, self.patches, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`(…, P, D)` → `(…, c, h, w)`. Inverse of `patchify`, for any number of channels."""
        lead = patches.shape[:-2]
        cells = patches.reshape(*lead, self.rows, self.columns, self.size, self.size, -1)
        rows, columns = self.rows * self.size, self.columns * self.size
        return cells.transpose(-4, -3).movedim(-1, -5).reshape(*lead, -1, rows, columns)


@dataclass(frozen=True)
class Plan:
    """What a sampler wants evaluated next. Times are Python floats, so that planning needs no device sync."""

    latent: Tensor
    """`(P, D)`: the current state, or a context that the sampler has made from it (look-ahead)."""
    times: tuple[float, ...]
    """The distinct timesteps of the evaluated patches."""
    time_index: Tensor | None = None
    """`(a,)` long: the index of each evaluated patch's time in `times`. None: all have the first."""
    patches: Tensor | None = None
    """`(a,)` long, ascending: the patches to evaluate. None: all."""
    guidance: float = 1.0
    """Classifier-free guidance scale. At 1, only the conditional branch runs."""
    null_index: Tensor | None = None
    """`(a_n,)` long, ascending: which of the evaluated patches also run in the null branch. None: all."""
    keep: bool = False
    """Cache keys and values for later plans that evaluate only some patches."""
    drift: Tensor | None = None
    """`(2, P)`, null branch first: how far to extrapolate each patch's cached keys and values, in units of the change
    between its last two evaluations. 0 for patches that are evaluated. None: no extrapolation."""
    grid: Grid | None = None
    """The grid of these patches. None: the sampler's."""

    @property
    def active(self) -> int:
        """a, the number of patches to evaluate."""
        return self.latent.shape[0] if self.patches is None else self.patches.shape[0]


@dataclass(frozen=True)
class Prediction:
    """The network's output for the planned patches."""

    velocity: Tensor
    """`(a, D)`: guided, for patches that also ran in the null branch."""
    conditional: Tensor
    """`(a, D)`: velocity of the conditional branch alone."""
    log_variance: Tensor
    """`(a, size²)`: guided like the velocity."""
    null: Tensor | None = None
    """`(a_n, D)`: velocity of the null branch alone, for its patches. None: it did not run."""
    conditional_log_variance: Tensor | None = None
    """`(a, size²)`: log-variance of the conditional branch alone. None: the same as the guided one."""

    @property
    def difficulty(self) -> Tensor:
        """`(a,)`: mean predicted variance over each patch's pixels (spec §6)."""
        return _variance(self.log_variance)

    @property
    def variance(self) -> Tensor:
        """`(a,)`: the same from the conditional branch alone. Training calibrates this one."""
        own = self.conditional_log_variance
        return _variance(self.log_variance if own is None else own)


def _variance(log_variance: Tensor) -> Tensor:
    return log_variance.clamp(*LOG_VARIANCE_RANGE).exp().mean(dim=-1)

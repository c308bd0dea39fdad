"""The base of all samplers: a pure state machine that plans evaluations and never runs the network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from patchforge.model.errors import ParameterError
from patchforge.model.types import Grid, Plan, Prediction


@dataclass(frozen=True)
class State:
    """The progress of one picture."""

    x: Tensor
    """`(P, D)`: the latent, each patch at its own time."""
    times: Tensor
    """`(P,)`: each patch's time; at 1 the patch is finished."""
    estimate: Tensor
    """`(P, D)`: the latest one-step estimate of the clean picture, `x_t + (1 − t)·v`."""
    difficulty: Tensor
    """`(P,)`: the latest predicted variance."""
    step: int = 0
    """Number of whole steps done."""
    evaluations: int = 0
    """Number of network evaluations done."""
    question: Tensor | None = None
    """`(k, P)` bool, on the device: `Sampler.answer` needs it on the CPU before the next plan. None: no question."""
    enlarge: Tensor | None = None
    """`(P/4, D)`, a picture of half the size: `Sampler.enlarged` needs it at full size before the next plan."""

    @classmethod
    def initial(cls, noise: Tensor) -> Self:
        """Start at t = 0 from noise `(P, D)`."""
        patches = noise.shape[0]
        return cls(noise, noise.new_zeros(patches), torch.zeros_like(noise), noise.new_ones(patches))


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Sampler(Generic[S]):
    """Parameters of all samplers. Unless a sampler says otherwise, its steps divide [0, 1] evenly.

    Raises:
        ParameterError: a parameter is out of range.
    """

    grid: Grid
    steps: int
    guidance: float

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "must be at least 1")
        require(self.guidance >= 0, "guidance", "must not be negative")

    @property
    def evaluations(self) -> int:
        """Number of network evaluations in a whole run. Both guidance branches together count once."""
        raise NotImplementedError

    @property
    def branches(self) -> int:
        """Number of guidance branches in a dense evaluation."""
        return 1 if self.guidance == 1 else 2

    @property
    def dense_patch_evaluations(self) -> int:
        """Patch evaluations of a run that evaluates every patch and branch each time, as the paper does."""
        return self.grid.patches * self.branches * self.evaluations

    def start(self, noise: Tensor) -> S:
        """Return the state at t = 0, from noise `(P, D)`."""
        raise NotImplementedError

    def start_from(self, noise: Tensor, clean: Tensor, times: Tensor, kept: Tensor | None = None) -> S:
        """Return the state to start from when editing a picture.

        Args:
            noise: `(P, D)`.
            clean: `(P, D)`, the picture's latents.
            times: `(P,)`, how much of each patch is given. A patch at 1 is known and stays as it is; all others start
                at the smallest of these times.
            kept: `(P, D)` bool, values that arrive at those of `clean`, also in patches that change. None: none.

        Raises:
            ParameterError: this sampler needs all patches at the same time.
        """
        raise ParameterError("sampler", "cannot start from a picture; use 'adaptive'")

    def plan(self, state: S) -> Plan | None:
        """Return what to evaluate next. None: the picture is finished."""
        raise NotImplementedError

    def advance(self, state: S, prediction: Prediction) -> S:
        """Return the state after the prediction for the last plan. It may have a `State.question`."""
        raise NotImplementedError

    def answer(self, state: S, answer: Tensor) -> S:
        """Return the state after its question is answered. It may have another question.

        `answer` `(k, P)` bool is the question's tensor on the CPU. This is separate from `advance`, so that one wait
        for the device serves many pictures.
        """
        raise NotImplementedError

    def enlarged(self, state: S, clean: Tensor) -> S:
        """Return the state after its small picture, `State.enlarge`, was enlarged to `clean` `(P, D)`.

        Only for samplers that ask for it, as with `answer`.
        """
        raise NotImplementedError

    def seen(self, state: S) -> tuple[Tensor, Grid]:
        """Return the latest estimate of the clean picture, and its grid, which may be smaller than the sampler's."""
        return state.estimate, self.grid

    def land(self, state: S) -> S:
        """Finish the picture now: every unfinished patch leaps to t = 1, onto its latest estimate.

        Raises:
            ValueError: nothing has been evaluated, so there is no estimate.
        """
        if state.evaluations == 0:
            raise ValueError("a picture cannot land before its first evaluation")
        going = (state.times < 1)[:, None]
        return replace(
            state,
            x=torch.where(going, state.estimate, state.x),
            times=torch.ones_like(state.times),
            step=self.steps,
            question=None,
        )

    def landing_error(self, state: S) -> Tensor:
        """Predict the error of `land`, `(P,)`: root mean square per patch, in units of the latents' deviation.

        What the network itself expects, for uniform samplers: `(1 − t)·σ`.
        """
        return (1 - state.times) * state.difficulty.sqrt()

    def finish_error(self, state: S) -> Tensor:
        """Predict the error of what finished patches left out, `(P,)`, in the same units."""
        return torch.zeros_like(state.times)

    def costs_ahead(self, state: S, unfinished: int) -> list[int]:
        """Patch evaluations of each evaluation to come, at most, if `unfinished` patches still move."""
        return [unfinished * self.branches] * (self.evaluations - state.evaluations)

    def shorten(self, state: S, steps: int, tolerance: float | None = None) -> tuple[Self, S] | None:
        """Return the sampler and state that take the rest of the way in `steps` steps; None: it has no such way.

        `tolerance` replaces that of a sampler which has one.
        """
        return None

    def time(self, step: int) -> float:
        """The time at which step `step` starts, counted from 0."""
        return step / self.steps


def require(condition: bool, field: str, message: str) -> None:
    """Check a parameter. A comparison with NaN is False, so NaN is refused too.

    Raises:
        ParameterError: `condition` is False; the error names `field`.
    """
    if not condition:
        raise ParameterError(field, message)


def easy_patches(prediction: Prediction, quantile: float) -> Tensor:
    """Select the easy patches: `(P,)` bool, difficulty strictly below the picture's quantile (spec §6).

    As in the paper, the quantile is over pixels, each with its patch's value. This shifts its interpolation slightly.
    """
    difficulty = prediction.difficulty.double()
    pixels = difficulty.repeat_interleave(prediction.log_variance.shape[-1])
    return difficulty < torch.quantile(pixels, quantile)


def estimate(x: Tensor, times: float | Tensor, velocity: Tensor) -> Tensor:
    """Estimate the clean patches `(…, D)` in one step from `x` at `times` (one time for all, or `(…,)`)."""
    ahead = 1 - times
    return x + (ahead[..., None] if isinstance(ahead, Tensor) else ahead) * velocity

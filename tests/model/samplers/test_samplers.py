"""Samplers as state machines, driven by made-up predictions, without a network."""

import math

import pytest
import torch

from patchforge.model.errors import ParameterError
from patchforge.model.samplers import Adaptive, DualLoop, Euler, Heun, LookAhead, Multistep, State, make_sampler
from patchforge.model.samplers.base import easy_patches
from patchforge.model.trajectory import Trajectory, plan_next
from patchforge.model.types import Grid, Plan, Prediction

GRID = Grid(4, 4, 2, 3)
CLEAN = torch.linspace(-1, 1, 16 * 12).view(16, 12)


def oracle(plan: Plan, noise: torch.Tensor, hard: torch.Tensor) -> Prediction:
    """Predict the true velocity towards CLEAN. Patches in `hard` (bool) are less certain than the others."""
    chosen = torch.arange(16) if plan.patches is None else plan.patches
    velocity = (CLEAN - noise)[chosen]
    certainty = torch.where(hard, 0.0, -4.0) - torch.arange(16) / 100  # no ties
    log_variance = certainty[chosen, None].expand(-1, 4)
    return Prediction(velocity, velocity, log_variance)


def advanced(sampler, state: State, prediction: Prediction) -> State:
    """Return the state after a prediction, with all its questions answered."""
    state = sampler.advance(state, prediction)
    while state.question is not None:
        state = sampler.answer(state, state.question)
    return state


def finish(sampler, noise: torch.Tensor, hard: torch.Tensor) -> tuple[State, list[Plan]]:
    state, plans = sampler.start(noise), []
    while (plan := sampler.plan(state)) is not None:
        plans.append(plan)
        state = advanced(sampler, state, oracle(plan, noise, hard))
    return state, plans


SAMPLERS = [
    Euler(GRID, 5, 2.0),
    DualLoop(GRID, 4, 2.0, 0.4, 4),
    DualLoop(GRID, 4, 1.0, 0.4, 4, exact=True),
    DualLoop(GRID, 3, 2.0, 0.7, 1),
    DualLoop(GRID, 3, 2.0, 0.0, 3),
    DualLoop(GRID, 3, 2.0, 1.0, 2),
    LookAhead(GRID, 24, 2.0, 0.4, 1.4),
    LookAhead(GRID, 1, 1.0),
    Multistep(GRID, 5, 2.0),
    Multistep(GRID, 1, 2.0, exponent=1.0),
    Heun(GRID, 5, 2.0),
    Heun(GRID, 1, 1.0),
    Adaptive(GRID, 5, 1.0, tolerance=0.0, skip_tolerance=0.0),
    Adaptive(GRID, 6, 1.0, exact=True, tolerance=0.0, refresh=2),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_with_the_true_velocity_every_sampler_arrives(sampler) -> None:
    noise = torch.randn(16, 12)
    state, plans = finish(sampler, noise, torch.arange(16) % 3 == 0)
    # Look-ahead's context lies on the same straight path, so all samplers are exact here.
    torch.testing.assert_close(state.x, CLEAN, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.estimate, CLEAN, atol=1e-5, rtol=0)
    assert state.times.tolist() == [1.0] * 16
    assert len(plans) == sampler.evaluations == state.evaluations


def test_dual_loop_moves_easy_patches_at_once_and_evaluates_only_hard_ones() -> None:
    hard = torch.arange(16) >= 6  # the 0.4-quantile of 64 pixels is the seventh patch: six are below it
    noise = torch.randn(16, 12)
    sampler = DualLoop(GRID, 2, 2.0, 0.4, 4)
    state = sampler.start(noise)
    state = advanced(sampler, state, oracle(sampler.plan(state), noise, hard))
    assert state.times[~hard].tolist() == pytest.approx([0.5] * 6)
    assert state.times[hard].tolist() == pytest.approx([0.125] * 10)
    refresh = sampler.plan(state)
    assert refresh.patches is None
    assert refresh.keep
    assert [refresh.times[i] for i in refresh.time_index] == pytest.approx(state.times.tolist())
    state = advanced(sampler, state, oracle(refresh, noise, hard))
    inner = sampler.plan(state)
    assert inner.patches.tolist() == hard.nonzero()[:, 0].tolist()
    assert inner.times == (0.25,)


@pytest.mark.parametrize(("quantile", "expected"), [(0.4, 0.8), (0.7, 0.65)])
def test_dual_loop_saves_what_the_share_of_easy_patches_promises(quantile: float, expected: float) -> None:
    """Two full evaluations and two of the hard patches: (2 + 2·(1 − share)) / 4."""
    generator = torch.Generator().manual_seed(0)
    sampler = DualLoop(GRID, 5, 1.0, quantile, 4)
    run = Trajectory.begin(sampler, {}, torch.randn(16, 12, generator=generator))
    while (plan := plan_next([run])[0]) is not None:
        values = torch.randn(plan.active, 12, generator=generator)
        uncertain = torch.randn(plan.active, 4, generator=generator)
        run.advance(Prediction(values, values, uncertain), plan.active)
    assert run.patch_evaluations / sampler.dense_patch_evaluations == pytest.approx(expected, abs=0.04)


def test_look_ahead_starts_unguided_then_evaluates_a_context_at_later_times() -> None:
    hard = torch.arange(16) >= 6
    noise = torch.randn(16, 12)
    _, plans = finish(LookAhead(GRID, 24, 3.0, 0.4, 1.4), noise, hard)
    early = [plan for plan in plans if plan.guidance == 1.0]
    assert [plan.times for plan in early] == [(0.0,), (1 / 24,)]
    context = plans[3]
    assert context.times == (pytest.approx(2 / 24), pytest.approx(1.4 * 2 / 24))
    assert (context.time_index == 1).tolist() == (~hard).tolist()
    assert max(plans[-1].times) == 1.0


def test_ties_at_the_quantile_are_hard() -> None:
    flat = Prediction(torch.zeros(16, 12), torch.zeros(16, 12), torch.zeros(16, 4))
    assert not easy_patches(flat, 0.4).any()


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("nope", {}, "sampler"),
        ("euler", {"steps": 0}, "steps"),
        ("euler", {"guidance": -1.0}, "guidance"),
        ("euler", {"guidance": float("nan")}, "guidance"),
        ("euler", {"ratio": 1.4}, "ratio"),
        ("dual_loop", {"quantile": 1.5}, "quantile"),
        ("dual_loop", {"inner_steps": 0}, "inner_steps"),
        ("look_ahead", {"ratio": 0.5}, "ratio"),
        ("multistep", {"exponent": 0.0}, "exponent"),
    ],
)
def test_bad_parameters_name_their_field(name: str, options: dict, field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        make_sampler(name, GRID, **({"steps": 4, "guidance": 1.0} | options))
    assert caught.value.field == field


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_multistep_is_of_second_order(exponent: float) -> None:
    """On dx/dt = −x, twice the steps leave about a quarter of the error (Euler: half)."""

    def error(sampler) -> float:
        state = sampler.start(torch.ones(16, 12, dtype=torch.float64))
        while (plan := sampler.plan(state)) is not None:
            velocity = -plan.latent
            state = sampler.advance(state, Prediction(velocity, velocity, torch.zeros(16, 4)))
        return abs(state.x[0, 0].item() - math.exp(-1))

    ratio = error(Multistep(GRID, 40, 1.0, exponent)) / error(Multistep(GRID, 80, 1.0, exponent))
    assert 3.4 < ratio < 4.6
    assert error(Euler(GRID, 40, 1.0)) / error(Euler(GRID, 80, 1.0)) < 2.2

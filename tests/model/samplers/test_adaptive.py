"""The adaptive sampler: what it evaluates, when patches finish, and how it starts from a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchforge.model.denoiser import Denoiser, active_patches
from patchforge.model.errors import ParameterError
from patchforge.model.guidance import Branch
from patchforge.model.samplers import Adaptive, Sampler, make_sampler
from patchforge.model.samplers.adaptive import MAX_REACH, AdaptiveState
from patchforge.model.samplers.track import Track
from patchforge.model.trajectory import Trajectory, plan_next, run
from patchforge.model.types import Grid, Plan, Prediction
from tests.model.samplers.test_samplers import advanced
from tests.model.tiny_networks import denoisers
from tests.rounding import assert_same

GRID = Grid(4, 4, 2, 3)
BENT = torch.arange(16) % 4 == 0
"""Patches whose path bends. The other paths are straight."""


def bent_path(plan: Plan, sure: float = -6.0) -> Prediction:
    """Predict velocities that depend on t alone: constant, but with a second derivative for `BENT`."""
    patches = torch.arange(16) if plan.patches is None else plan.patches
    index = torch.zeros(len(patches), dtype=torch.long) if plan.time_index is None else plan.time_index
    times = torch.tensor(plan.times)[index]
    velocity = torch.where(BENT[patches], 40 * times**2, 1.0)[:, None].expand(-1, 12)
    null = velocity * 0.5
    return Prediction(velocity, velocity, torch.full((len(patches), 4), sure), null if plan.guidance != 1 else None)


def played(sampler: Adaptive, state: AdaptiveState) -> tuple[AdaptiveState, list[Plan], list[AdaptiveState]]:
    plans, states = [], []
    while (plan := sampler.plan(state)) is not None:
        prediction = bent_path(plan)
        if prediction.null is not None and plan.null_index is not None:
            prediction = Prediction(
                prediction.velocity, prediction.conditional, prediction.log_variance, prediction.null[plan.null_index]
            )
        state = advanced(sampler, state, prediction)
        plans.append(plan)
        states.append(state)
    return state, plans, states


def test_straight_patches_finish_and_are_never_evaluated_again() -> None:
    sampler = Adaptive(GRID, 8, 1.0, exponent=1.25, tolerance=0.05, skip_tolerance=0.0)
    state, plans, states = played(sampler, sampler.start(torch.zeros(16, 12)))
    finished = torch.zeros(16, dtype=torch.bool)
    for plan, after in zip(plans, states, strict=True):
        asked = set(range(16)) if plan.patches is None else set(plan.patches.tolist())
        assert not asked & set(finished.nonzero()[:, 0].tolist())
        finished |= after.times >= 1
    assert states[2].times[~BENT].tolist() == [1.0] * 12, "three evaluations tell that a path is straight"
    torch.testing.assert_close(state.x[~BENT], torch.ones(12, 12))
    torch.testing.assert_close(state.x[BENT], torch.full((4, 12), 40 / 3), atol=1, rtol=0)
    assert state.times.tolist() == [1.0] * 16


def test_patches_whose_path_is_straight_are_skipped_not_finished_when_the_network_is_unsure() -> None:
    sampler = Adaptive(GRID, 8, 1.0, exponent=1.25, tolerance=0.0, skip_tolerance=0.02)
    state, plans, _ = played(sampler, sampler.start(torch.zeros(16, 12)))
    later = [set(plan.patches.tolist()) for plan in plans[3:] if plan.patches is not None]
    assert later
    assert all(asked <= set(BENT.nonzero()[:, 0].tolist()) for asked in later)
    torch.testing.assert_close(state.x[~BENT], torch.ones(12, 12))


def test_what_is_not_evaluated_shows_others_keys_and_values_at_the_time_all_have_reached() -> None:
    sampler = Adaptive(GRID, 8, 1.0, exponent=1.0, tolerance=0.05, skip_tolerance=0.0)
    _, plans, _ = played(sampler, sampler.start(torch.zeros(16, 12)))
    drift = plans[3].drift[int(True)]
    assert drift[BENT].tolist() == [0.0] * 4, "evaluated afresh"
    assert drift[~BENT].tolist() == [MAX_REACH] * 12, "extrapolated, but not as far as one step beyond two a step apart"


@pytest.mark.parametrize("kind", [0, 1], ids=["class", "text"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("order", [1, 2])
def test_without_tolerance_it_is_the_uniform_sampler_of_its_order(kind: int, guidance: float, order: int) -> None:
    denoiser, conditions = denoisers()[kind]
    options: dict[str, float] = {"exponent": 1.25} if order == 2 else {}
    adaptive = Adaptive(denoiser.grid, 5, guidance, order=order, tolerance=0.0, skip_tolerance=0.0, **options)  # type: ignore[arg-type]
    uniform = make_sampler({1: "euler", 2: "multistep"}[order], denoiser.grid, 5, guidance, **options)
    noise = torch.randn(denoiser.grid.patches, denoiser.grid.values)
    both: tuple[Sampler[Any], ...] = (adaptive, uniform)
    runs = [Trajectory.begin(each, conditions[0], noise) for each in both]
    run(denoiser, runs)
    torch.testing.assert_close(runs[0].state.x, runs[1].state.x, atol=2e-5, rtol=0)
    assert runs[0].patch_evaluations == runs[1].patch_evaluations == adaptive.dense_patch_evaluations


def test_outside_its_interval_guidance_costs_nothing() -> None:
    sampler = Adaptive(GRID, 8, 3.0, exponent=1.0, tolerance=0.0, skip_tolerance=0.0, guidance_until=0.5)
    state, plans, _ = played(sampler, sampler.start(torch.zeros(16, 12)))
    assert [plan.guidance for plan in plans] == [3.0] * 4 + [1.0] * 4
    # The null velocity is half the conditional one, so guidance at scale 3 doubles it, here for half of the path.
    torch.testing.assert_close(state.x[~BENT], torch.full((12, 12), 1.5))
    late = Adaptive(GRID, 8, 3.0, exponent=1.0, tolerance=0.0, skip_tolerance=0.0, guidance_from=0.5)
    state, plans, _ = played(late, late.start(torch.zeros(16, 12)))
    assert [plan.guidance for plan in plans] == [1.0] * 4 + [3.0] * 4
    torch.testing.assert_close(state.x[~BENT], torch.full((12, 12), 1.5))


def test_a_step_is_guided_if_its_middle_is() -> None:
    guided = {
        (0.0, 0.5): [3.0, 3.0, 1.0, 1.0],
        (0.2, 0.75): [1.0, 3.0, 3.0, 1.0],
        (0.125, 0.375): [3.0, 1.0, 1.0, 1.0],
        (0.5, 0.5): [1.0] * 4,
    }
    for (low, high), expected in guided.items():
        sampler = Adaptive(GRID, 4, 3.0, tolerance=0.0, skip_tolerance=0.0, guidance_from=low, guidance_until=high)
        _, plans, _ = played(sampler, sampler.start(torch.zeros(16, 12)))
        assert [plan.guidance for plan in plans] == expected


def test_of_order_1_two_evaluations_are_enough_to_finish() -> None:
    sampler = Adaptive(GRID, 4, 1.0, order=1, tolerance=0.05, skip_tolerance=0.0)
    state, plans, states = played(sampler, sampler.start(torch.zeros(16, 12)))
    assert [plan.active for plan in plans] == [16, 16, 4, 4]
    assert states[1].times[~BENT].tolist() == [1.0] * 12
    torch.testing.assert_close(state.x[~BENT], torch.ones(12, 12))


def test_guidance_carries_a_leap_no_further_than_its_step() -> None:
    sampler = Adaptive(GRID, 4, 3.0, order=1, tolerance=10.0, skip_tolerance=0.0, guidance_from=0.25)
    state, plans, _ = played(sampler, sampler.start(torch.zeros(16, 12)))
    assert [plan.active for plan in plans] == [16, 16]
    # Velocity 1 all the way; and in the next step, twice the half by which the null velocity is smaller.
    torch.testing.assert_close(state.x[~BENT], torch.full((12, 12), 1.25))


def test_the_null_branch_runs_only_for_patches_whose_guidance_bends() -> None:
    sampler = Adaptive(GRID, 8, 3.0, exponent=1.25, tolerance=0.0, skip_tolerance=0.02)
    _, plans, _ = played(sampler, sampler.start(torch.zeros(16, 12)))
    assert active_patches(plans[0], Branch.NULL) == 16
    assert active_patches(plans[4], Branch.NULL) == 4


def test_every_patch_is_evaluated_at_a_refresh_and_when_exact() -> None:
    renewed = Adaptive(GRID, 9, 1.0, exponent=1.25, tolerance=0.05, skip_tolerance=0.0, refresh=4)
    _, plans, _ = played(renewed, renewed.start(torch.zeros(16, 12)))
    assert [plan.active for plan in plans] == [16, 16, 16, 4, 16, 4, 4, 4]
    exact = Adaptive(GRID, 9, 1.0, exponent=1.25, tolerance=0.05, skip_tolerance=0.02, exact=True)
    _, plans, _ = played(exact, exact.start(torch.zeros(16, 12)))
    assert [plan.active for plan in plans] == [16] * 9


def test_known_patches_stay_and_cost_one_evaluation() -> None:
    sampler = Adaptive(GRID, 6, 1.0, exponent=1.25, tolerance=0.0, skip_tolerance=0.0)
    clean, noise = torch.full((16, 12), 7.0), torch.zeros(16, 12)
    times = torch.where(torch.arange(16) < 10, 1.0, 0.0)
    state, plans, _ = played(sampler, sampler.start_from(noise, clean, times))
    assert torch.equal(state.x[:10], clean[:10])
    assert plans[0].time_index.tolist() == [1] * 10 + [0] * 6
    assert [plan.active for plan in plans] == [16] + [6] * 5


def test_a_variation_begins_where_it_is_told() -> None:
    sampler = Adaptive(GRID, 10, 1.0, exponent=1.0, tolerance=0.0, skip_tolerance=0.0)
    clean, noise = torch.full((16, 12), 2.0), torch.zeros(16, 12)
    state = sampler.start_from(noise, clean, torch.full((16,), 0.65))
    torch.testing.assert_close(state.x, torch.full((16, 12), 1.3))
    state, plans, _ = played(sampler, state)
    assert [plan.times[0] for plan in plans] == pytest.approx([0.65, 0.7, 0.8, 0.9])
    torch.testing.assert_close(state.x[~BENT], torch.full((12, 12), 1.65))
    with pytest.raises(ParameterError, match="adaptive"):
        make_sampler("euler", GRID, 5, 1.0).start_from(noise, clean, torch.zeros(16))


@pytest.mark.parametrize("kind", [0, 1], ids=["class", "text"])
def test_packed_with_others_it_gives_what_it_gives_alone(kind: int) -> None:
    denoiser, conditions = denoisers()[kind]

    def begin() -> list[Trajectory]:
        choices = [
            {"steps": 7, "guidance": 2.0, "tolerance": 0.5, "skip_tolerance": 0.05},
            {"steps": 5, "guidance": 1.0, "tolerance": 0.3, "skip_tolerance": 0.0},
            {"steps": 8, "guidance": 3.0, "tolerance": 0.4, "skip_tolerance": 0.1, "guidance_until": 0.6},
        ]
        runs = []
        for number, options in enumerate(choices * 2):
            noise = torch.randn(denoiser.grid.latent_shape, generator=torch.Generator().manual_seed(number))
            sampler = make_sampler("adaptive", denoiser.grid, **options)
            runs.append(Trajectory.begin(sampler, conditions[number % 2], denoiser.grid.patchify(noise)))
        return runs

    together, alone = begin(), begin()
    run(denoiser, together)
    for each in alone:
        run(denoiser, [each])
    for packed, single in zip(together, alone, strict=True):
        assert_same(packed.state.x, single.state.x)
        assert packed.patch_evaluations == single.patch_evaluations


def test_an_evaluation_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, conditions = denoisers()[0]
    noise = torch.randn(16, 12)
    options = {"tolerance": 0.5, "skip_tolerance": 0.05}
    whole, broken = (
        Trajectory.begin(Adaptive(denoiser.grid, 6, 2.0, exponent=1.25, **options), conditions[0], noise)
        for _ in range(2)
    )
    run(denoiser, [whole])
    head = denoiser.network.final_layer
    while (plan := plan_next([broken])[0]) is not None:
        with monkeypatch.context() as patched:
            patched.setattr(head, "forward", failing)
            with pytest.raises(RuntimeError, match="half-way"):
                denoiser.evaluate([broken.evaluation(plan)])
        [prediction] = denoiser.evaluate([broken.evaluation(plan)])
        broken.advance(prediction, 0)
    assert torch.equal(broken.state.x, whole.state.x)


def failing(*_: object) -> Tensor:
    raise RuntimeError("stopped half-way")


def test_rows_are_free_for_others_once_a_picture_is_gone() -> None:
    network = denoisers()[0][0].network
    denoiser, conditions = Denoiser(network), denoisers()[0][1]
    for _ in range(3):
        runs = [Trajectory.begin(Adaptive(GRID, 2, 2.0), conditions[0], torch.randn(16, 12)) for _ in range(3)]
        run(denoiser, runs)
        assert denoiser.pool.rows_in_use == 6 * 2 * 16
        bytes_held = denoiser.pool._rows.nbytes
        del runs
        assert denoiser.pool.rows_in_use == 0
        assert denoiser.pool._rows.nbytes == 0, "given back once nobody needs it"
    assert bytes_held == 8 * denoiser.pool.slot_bytes(16), "twice four slots, not more each time"


def test_a_track_predicts_the_error_of_a_parabola_exactly() -> None:
    track = Track.begin(torch.zeros(2, 3))
    every = torch.arange(2)
    for time in (0.1, 0.2, 0.4):
        track = track.record(every, torch.tensor([[5 * time**2] * 3, [2 * time] * 3]), time)
    at = 0.75
    missed = (5 * at**2 - track.extrapolate(at)[0]).abs().mean()
    assert (0.5 * track.curvature[0] * 2 * (at - 0.4) * (at - 0.2)).item() == pytest.approx(missed.item(), rel=1e-4)
    assert track.error(0.7, 0.8)[0].item() == pytest.approx(0.1 * missed.item(), rel=1e-4)
    assert track.error(0.7, 0.8)[1].item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(track.reach(0.6), torch.ones(2))


def test_the_error_of_holding_a_value_is_half_of_what_it_changes_by() -> None:
    track = Track.begin(torch.zeros(2, 3))
    assert track.size(0.0, 0.1).tolist() == [torch.inf] * 2, "nothing is known"
    track = track.record(torch.tensor([0, 1]), torch.tensor([[2.0] * 3, [1.0] * 3]), 0.0)
    assert track.error(0.0, 0.1, order=1).tolist() == [torch.inf] * 2, "one value does not tell a change"
    assert track.size(0.0, 0.1).tolist() == pytest.approx([0.2, 0.1])
    track = track.record(torch.tensor([0]), torch.tensor([[3.0] * 3]), 0.5)
    torch.testing.assert_close(track.extrapolate(0.7, order=1), torch.tensor([[3.0] * 3, [1.0] * 3]))
    # The value grows by 2 per unit of time: to 3.2 at 0.6, so by 0.1 on average until then.
    assert track.error(0.5, 0.6, order=1)[0].item() == pytest.approx(0.1 * 0.1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("exponent", 0.1),
        ("order", 3),
        ("tolerance", -0.1),
        ("skip_tolerance", float("nan")),
        ("guidance_until", 1.5),
        ("refresh", -1),
    ],
)
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(ParameterError) as caught:
        make_sampler("adaptive", GRID, 4, 1.0, **{option: value})
    assert caught.value.field == option

"""A picture costs no more than its budget, ends all the same, and repeats bit for bit from its changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from patchforge.model.budget import fit, replay
from patchforge.model.errors import ParameterError
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Adaptive, Euler, Sampler
from patchforge.model.trajectory import Change, Trajectory, run
from tests.model.samplers.test_samplers import CLEAN, GRID, SAMPLERS, advanced, oracle

NOISE = torch.linspace(2, -2, 16 * 12).view(16, 12)
HARD = torch.arange(16) % 3 == 0


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_sampler_lands_on_its_estimate_after_any_evaluation(sampler: Sampler[Any]) -> None:
    state = sampler.start(NOISE)
    with pytest.raises(ValueError, match="before its first evaluation"):
        sampler.land(state)
    while (plan := sampler.plan(state)) is not None:
        state = advanced(sampler, state, oracle(plan, NOISE, HARD))
        error = sampler.landing_error(state)
        assert error.shape == (16,)
        assert bool((error >= 0).all())
        landed = sampler.land(state)
        assert sampler.plan(landed) is None
        assert landed.times.tolist() == [1.0] * 16
        torch.testing.assert_close(landed.x, CLEAN, atol=1e-5, rtol=0)  # the velocity is the true one
    assert float(sampler.landing_error(state).max()) == 0, "it has arrived"


def test_the_less_certain_a_patch_the_larger_its_predicted_error() -> None:
    sampler = Euler(GRID, 4, 1.0)
    state = sampler.start(NOISE)
    state = sampler.advance(state, oracle(sampler.plan(state), NOISE, HARD))
    error = sampler.landing_error(state)
    assert float(error[HARD].min()) > float(error[~HARD].max())


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("left", [1, 2, 4])
def test_the_rest_of_the_way_in_fewer_steps(taken: int, left: int) -> None:
    sampler = Adaptive(GRID, 8, 1.0, tolerance=0.0, skip_tolerance=0.0, exponent=1.5)
    state = sampler.start(NOISE)
    for _ in range(taken):
        state = advanced(sampler, state, oracle(sampler.plan(state), NOISE, HARD))
    shorter, moved = sampler.shorten(state, left)
    assert len(shorter.costs_ahead(moved, 16)) == left
    while moved.question is not None:
        moved = shorter.answer(moved, moved.question)
    made = 0
    while (plan := shorter.plan(moved)) is not None:
        moved, made = advanced(shorter, moved, oracle(plan, NOISE, HARD)), made + 1
    assert made == left
    torch.testing.assert_close(moved.x, CLEAN, atol=1e-5, rtol=0)


def made(pipeline: Pipeline, sampler: Sampler[Any], budget: int | None = None, changes: Sequence[Change] = ()) -> Any:
    """Draw one picture within a budget, or with the changes of an earlier run."""
    condition = pipeline.condition_on("cat" if pipeline.manifest.class_names else "a cat")
    trajectory = Trajectory.begin(sampler, condition, pipeline.noise(3))
    if changes:
        run(pipeline.denoiser, [trajectory], change=lambda runs: replay(runs[0], changes))
    else:
        pipeline_run = partial(pipeline.sample, sampler, [condition], [3])
        return pipeline_run(budget=budget)[1][0]
    return trajectory


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
@pytest.mark.parametrize("share", [0.06, 0.13, 0.3, 0.55, 0.9])
def test_a_budget_is_kept_and_its_changes_repeat_the_picture(
    pipelines: dict[str, Pipeline], name: str, share: float
) -> None:
    pipeline = pipelines[name]
    sampler = pipeline.sampler("adaptive", steps=10, guidance=3.0, tolerance=0.0, skip_tolerance=0.0)
    free = made(pipeline, sampler)
    assert free.patch_evaluations == 10 * 2 * pipeline.grid.patches
    budget = int(share * free.patch_evaluations)
    held = made(pipeline, sampler, budget)
    assert 0.5 * budget < held.patch_evaluations <= budget
    assert held.dense_patch_evaluations == free.dense_patch_evaluations
    assert float(held.state.times.min()) == 1.0
    assert held.changes
    again = made(pipeline, sampler, changes=held.changes)
    assert torch.equal(again.state.x, held.state.x)
    assert again.patch_evaluations == held.patch_evaluations


def test_with_room_enough_a_picture_is_bit_for_bit_what_it_is_without(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    sampler = pipeline.sampler("adaptive", steps=6, guidance=3.0)
    free = made(pipeline, sampler)
    held = made(pipeline, sampler, 6 * 2 * pipeline.grid.patches)
    assert held.changes == []
    assert torch.equal(held.state.x, free.state.x)


def test_uniform_samplers_land_when_nothing_is_left(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    patches = pipeline.grid.patches
    held = made(pipeline, pipeline.sampler("euler", steps=5, guidance=3.0), 6 * patches)
    assert held.changes == [Change(3, 0)]
    assert held.patch_evaluations == 6 * patches
    assert held.landing_error.shape == (patches,)
    with pytest.raises(ParameterError, match=f"at least {2 * patches} patch evaluations"):
        made(pipeline, pipeline.sampler("euler", steps=5, guidance=3.0), patches)


def test_one_look_at_every_patch_is_the_least(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    patches = pipeline.grid.patches
    sampler = pipeline.sampler("adaptive", steps=5, guidance=3.0)
    held = made(pipeline, sampler, patches)
    assert held.changes == [Change(0, 1, guided=False, tolerance=0.0)]
    assert held.patch_evaluations == patches
    with pytest.raises(ParameterError, match=f"at least {patches} patch evaluations") as refused:
        made(pipeline, sampler, patches - 1)
    assert refused.value.field == "budget"


@pytest.mark.parametrize(
    ("looks", "steps", "guided"), [(9, 4, True), (6, 3, True), (5, 5, False), (2, 2, False), (1, 1, False)]
)
def test_a_budget_costs_steps_then_guidance_and_no_patch_is_cut_short(
    pipelines: dict[str, Pipeline], looks: int, steps: int, guided: bool
) -> None:
    pipeline = pipelines["tiny-text"]
    patches = pipeline.grid.patches
    sampler = pipeline.sampler("adaptive", steps=6, guidance=3.0, tolerance=0.3, skip_tolerance=0.0)
    held = made(pipeline, sampler, looks * patches)
    assert held.changes == [Change(0, steps, guided, tolerance=0.0)]
    assert held.patch_evaluations == steps * patches * (2 if guided else 1)


def test_the_high_level_call_takes_a_budget(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    budget = 3 * pipeline.grid.patches
    picture = pipeline.generate("a cat", sampler="adaptive", steps=6, guidance=3.0, budget=budget).pictures[0]
    assert picture.report.patch_evaluations <= budget
    assert picture.report.dense_patch_evaluations == 6 * 2 * pipeline.grid.patches


def test_a_path_that_cannot_be_shortened_says_so(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    trajectory = Trajectory.begin(pipeline.sampler("euler", steps=5, guidance=1.0), {}, pipeline.noise(0))
    with pytest.raises(ValueError, match="Euler cannot"):
        trajectory.change(Change(0, 2))
    assert fit(trajectory, 5 * pipeline.grid.patches, pipeline.grid.patches) is False

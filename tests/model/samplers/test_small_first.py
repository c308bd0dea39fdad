"""Small first: the steps near noise at half the size, then the picture is enlarged and refined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from patchforge.model.budget import check_path, fit_all, lower, replay
from patchforge.model.errors import ParameterError
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Adaptive, SmallFirst
from patchforge.model.trajectory import Change, Trajectory, plan_next, run
from patchforge.model.types import Plan

OPTIONS = {"steps": 4, "guidance": 3.0, "tolerance": 0.0, "skip_tolerance": 0.0, "small_until": 0.5}
WHOLE = 3 * 4 * 2 + 2 * 16 * 2
"""Patch evaluations: at 0, 0.25 and 0.5 of four patches, at 0.5 and 0.75 of sixteen, in both branches."""


@pytest.fixture
def pipeline(pipelines: dict[str, Pipeline]) -> Pipeline:
    return pipelines["tiny-text"]


def begun(pipeline: Pipeline, seed: int = 1, **options: Any) -> Trajectory:
    sampler = pipeline.sampler("adaptive", **(OPTIONS | options))
    return pipeline.begin(sampler, pipeline.condition_on("a cat"), pipeline.noise(seed))


def steps_of(pipeline: Pipeline, trajectory: Trajectory) -> list[tuple[Plan, int]]:
    """Run it to its end; each plan, with the patch evaluations that were forecast for it."""
    made = []
    [plan] = plan_next([trajectory])
    while plan is not None:
        unfinished = int((trajectory.state.times < 1).sum())
        made.append((plan, trajectory.sampler.costs_ahead(trajectory.state, unfinished)[0]))
        [prediction] = pipeline.denoiser.evaluate([trajectory.evaluation(plan)])
        trajectory.advance(prediction, pipeline.denoiser.patches(plan))
        [plan] = plan_next([trajectory])
    return made


def test_it_begins_on_a_quarter_of_the_patches_and_ends_on_all(pipeline: Pipeline) -> None:
    trajectory = begun(pipeline)
    ahead = trajectory.sampler.costs_ahead(trajectory.state, 16)
    made = steps_of(pipeline, trajectory)
    assert [plan.latent.shape[0] for plan, _ in made] == [4, 4, 4, 16, 16]
    assert [plan.times[0] for plan, _ in made] == [0.0, 0.25, 0.5, 0.5, 0.75]
    assert [cost for _, cost in made] == ahead == [8, 8, 8, 32, 32]
    assert trajectory.patch_evaluations == sum(ahead) == WHOLE
    assert trajectory.state.evaluations == trajectory.evaluations == 5
    assert trajectory.dense_patch_evaluations == 4 * 16 * 2, "of the same steps, all at full size"
    assert trajectory.state.times.tolist() == [1.0] * 16


def test_patches_show_where_the_small_picture_stands(pipeline: Pipeline) -> None:
    trajectory = begun(pipeline)
    [plan] = plan_next([trajectory])
    assert plan is not None
    [prediction] = pipeline.denoiser.evaluate([trajectory.evaluation(plan)])
    trajectory.advance(prediction, 8)
    patches, grid = trajectory.seen
    assert (patches.shape[0], grid.rows, grid.columns) == (4, 2, 2)
    assert trajectory.state.times.tolist() == [0.5 * 0.25] * 16
    corner = trajectory.state.difficulty.view(4, 4)[:2, :2]
    assert corner.unique().numel() == 1
    assert trajectory.state.difficulty.unique().numel() == 4


def test_small_and_large_pictures_share_evaluations_and_stay_what_they_are_alone(pipeline: Pipeline) -> None:
    def mix() -> list[Trajectory]:
        others = begun(pipeline, 2, tolerance=0.3), begun(pipeline, 3, small_until=0.0), begun(pipeline, 4, steps=7)
        return [begun(pipeline), *others]

    together = mix()
    run(pipeline.denoiser, together)
    for alone, packed in zip(mix(), together, strict=True):
        run(pipeline.denoiser, [alone])
        assert torch.equal(alone.state.x, packed.state.x)
        assert alone.patch_evaluations == packed.patch_evaluations


def test_patches_of_the_small_picture_finish_early_too(pipeline: Pipeline) -> None:
    easy = begun(pipeline, steps=8, tolerance=10.0, guidance=1.0)
    made = steps_of(pipeline, easy)
    assert [plan.latent.shape[0] for plan, _ in made] == [4] * 3 + [16], "not five and four"
    assert easy.state.times.tolist() == [1.0] * 16


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
def test_it_lands_at_any_time(pipeline: Pipeline, taken: int) -> None:
    trajectory = begun(pipeline)

    def change(runs: Any) -> bool:
        if trajectory.state.evaluations != taken or trajectory.changes:
            return False
        trajectory.change(Change(taken, 0))
        return True

    run(pipeline.denoiser, [trajectory], change=change)
    assert trajectory.state.evaluations == taken
    assert trajectory.state.times.tolist() == [1.0] * 16
    assert trajectory.state.x.shape == (16, 16)
    assert trajectory.landing_error is not None
    assert float(trajectory.landing_error.max()) > 0
    again = begun(pipeline)
    run(pipeline.denoiser, [again], change=lambda runs: replay(runs[0], trajectory.changes))
    assert torch.equal(again.state.x, trajectory.state.x)


def test_it_does_not_land_before_its_first_evaluation(pipeline: Pipeline) -> None:
    with pytest.raises(ParameterError, match="before its first evaluation"):
        begun(pipeline).change(Change(0, 0))


@pytest.mark.parametrize("budget", [16, 20, 40, 60, WHOLE - 1, WHOLE])
def test_it_keeps_to_a_budget(pipeline: Pipeline, budget: int) -> None:
    trajectory = begun(pipeline)
    run(pipeline.denoiser, [trajectory], change=lambda runs: fit_all(runs, budget))
    assert trajectory.patch_evaluations <= budget
    assert trajectory.state.times.tolist() == [1.0] * 16
    assert bool(trajectory.changes) == (budget < WHOLE)
    if budget <= 20:
        assert trajectory.state.evaluations >= 3, "a finished small picture, enlarged, rather than one look at a large"
    again = begun(pipeline)
    run(pipeline.denoiser, [again], change=lambda runs: replay(runs[0], trajectory.changes))
    assert torch.equal(again.state.x, trajectory.state.x)
    assert again.patch_evaluations == trajectory.patch_evaluations


def test_a_budget_too_small_for_one_look_at_every_patch_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ParameterError, match="at least 16"):
        fit_all([begun(pipeline)], 15)


def test_a_picture_to_edit_is_worked_on_at_full_size(pipeline: Pipeline) -> None:
    sampler = pipeline.sampler("adaptive", **OPTIONS)
    assert isinstance(sampler, SmallFirst)
    state = sampler.start_from(pipeline.noise(1), torch.zeros(16, 16), torch.full((16,), 0.2))
    edited = pipeline.begin(sampler, pipeline.condition_on("a cat"), pipeline.noise(1), state)
    assert [plan.latent.shape[0] for plan, _ in steps_of(pipeline, edited)] == [16] * 4
    assert edited.seen[1] == pipeline.grid


def test_where_half_the_size_is_not_native_it_is_passed_over(pipelines: dict[str, Pipeline]) -> None:
    text, by_class = pipelines["tiny-text"], pipelines["tiny-class"]
    assert type(text.sampler("adaptive", **OPTIONS)) is SmallFirst
    assert type(text.sampler("adaptive", grid=text.grids[16, 16], **OPTIONS)) is Adaptive
    assert type(by_class.sampler("adaptive", **OPTIONS)) is Adaptive


def test_where_the_size_cannot_be_halved_it_is_passed_over(pipeline: Pipeline) -> None:
    odd = replace(pipeline.grid, rows=3)
    assert type(pipeline.sampler("adaptive", grid=odd, **OPTIONS)) is Adaptive


def test_with_too_few_steps_it_is_passed_over(pipeline: Pipeline) -> None:
    kinds = [type(pipeline.sampler("adaptive", **(OPTIONS | {"steps": steps}))) for steps in (1, 2, 3)]
    assert kinds == [Adaptive, Adaptive, SmallFirst]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_load_lowers_it_until_nothing_is_left_to_lower(pipeline: Pipeline, guidance: float) -> None:
    trajectory = begun(pipeline, steps=9, guidance=guidance)
    changes = [lower(trajectory, 1.0, 16) for _ in range(4)]
    assert changes == [True, False, False, False]
    assert trajectory.sampler.steps == 3
    run(pipeline.denoiser, [trajectory])
    assert trajectory.patch_evaluations == 3 * 4 + 16


@pytest.mark.parametrize("small_until", [1 / 3, 0.33, 0.5, 2 / 7])
@pytest.mark.parametrize("steps", [3, 6, 7])
def test_full_size_begins_at_the_time_of_a_step(pipeline: Pipeline, steps: int, small_until: float) -> None:
    trajectory = begun(pipeline, steps=steps, small_until=small_until)
    ahead = trajectory.sampler.costs_ahead(trajectory.state, 16)
    made = steps_of(pipeline, trajectory)
    large = [plan.times[0] * steps for plan, _ in made if plan.latent.shape[0] == 16]
    assert large == pytest.approx(range(round(large[0]), steps))
    assert large[0] / steps >= small_until - 1e-6
    assert [cost for _, cost in made] == ahead


def test_a_path_that_changes_a_small_picture_is_refused(pipeline: Pipeline) -> None:
    for change in (Change(1, 2), Change(2, 1, guided=False)):
        with pytest.raises(ParameterError) as refused:
            check_path(begun(pipeline), [change])
        assert refused.value.field == "path"
    check_path(begun(pipeline), [Change(0, 6), Change(3, 0)])
    check_path(begun(pipeline), [Change(3, 1)])
    check_path(begun(pipeline, small_until=0.0), [Change(1, 2)])


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_time_out_of_range_is_refused_by_name(pipelines: dict[str, Pipeline], value: float) -> None:
    for pipeline in pipelines.values():
        with pytest.raises(ParameterError) as refused:
            pipeline.sampler("adaptive", **(OPTIONS | {"small_until": value}))
        assert refused.value.field == "small_until"


def test_the_enlarged_picture_has_the_colours_of_the_small_one(pipeline: Pipeline) -> None:
    small = pipeline.encode(torch.full((1, 16, 16, 3), 200, dtype=torch.uint8))[0]
    shown = pipeline.decode(small[None], pipeline.grid.half).float().mean((1, 2))
    large = pipeline.encode(torch.full((1, 32, 32, 3), round(float(shown.mean())), dtype=torch.uint8))[0]
    assert pipeline.enlarge(pipeline.grid, small).shape == large.shape == (16, 16)

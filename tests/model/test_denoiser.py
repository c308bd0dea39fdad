"""Packing: a mix of plans in one evaluation gives the same as each plan alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from patchforge.model.denoiser import Denoiser, Evaluation, Memory
from patchforge.model.guidance import Branch
from patchforge.model.networks.attention import Layout
from patchforge.model.parallel import here
from patchforge.model.samplers import SAMPLERS, make_sampler
from patchforge.model.training.loop import at_grid
from patchforge.model.trajectory import Trajectory, run
from patchforge.model.types import Grid, Plan, Prediction
from tests.model.tiny_networks import class_network, denoisers, text_denoiser, text_network
from tests.rounding import assert_same

MIX = [
    ("euler", {"steps": 3, "guidance": 1.0}),
    ("dual_loop", {"steps": 2, "guidance": 2.5, "quantile": 0.4, "inner_steps": 3}),
    ("look_ahead", {"steps": 4, "guidance": 1.5, "quantile": 0.6, "ratio": 1.8}),
    ("dual_loop", {"steps": 3, "guidance": 1.0, "quantile": 0.7, "inner_steps": 4}),
    ("euler", {"steps": 5, "guidance": 3.0}),
    ("dual_loop", {"steps": 2, "guidance": 2.0, "quantile": 0.4, "inner_steps": 4, "exact": True}),
    ("adaptive", {"steps": 8, "guidance": 2.0, "tolerance": 0.05, "skip_tolerance": 0.005}),
    ("multistep", {"steps": 5, "guidance": 1.5}),
    ("heun", {"steps": 3, "guidance": 2.0}),
]


SHAPES = ((4, 4), (2, 4), (4, 2), (3, 5), (2, 2))
"""Rows and columns that a text network of 4 × 4 patches can work on: several sizes and aspect ratios."""


def trajectories(denoiser: Denoiser, conditions, shapes=((4, 4),)) -> list[Trajectory]:
    """One picture with each sampler; their grids have `shapes` in turn."""
    runs = []
    for number, (name, options) in enumerate(MIX):
        rows, columns = shapes[number % len(shapes)]
        grid = replace(denoiser.grid, rows=rows, columns=columns)
        noise = torch.randn(grid.latent_shape, generator=torch.Generator().manual_seed(number))
        sampler = make_sampler(name, grid, **options)
        runs.append(Trajectory.begin(sampler, conditions[number % len(conditions)], grid.patchify(noise)))
    return runs


@pytest.mark.parametrize("kind", [0, 1], ids=["class", "text"])
def test_a_mixed_pack_gives_every_picture_what_it_gets_alone(kind: int) -> None:
    denoiser, conditions = denoisers()[kind]
    together, alone = trajectories(denoiser, conditions), trajectories(denoiser, conditions)
    run(denoiser, together)
    for each in alone:
        run(denoiser, [each])
    for packed, single in zip(together, alone, strict=True):
        torch.testing.assert_close(packed.state.x, single.state.x, atol=2e-5, rtol=0)
        assert packed.patch_evaluations == single.patch_evaluations


@pytest.mark.parametrize("turn", range(len(SHAPES)))
def test_pictures_of_any_sizes_share_evaluations_and_stay_what_they_are_alone(turn: int) -> None:
    denoiser, conditions = text_denoiser()
    shapes = SHAPES[turn:] + SHAPES[:turn]  # so that every sampler draws every size
    together, alone = (trajectories(denoiser, conditions, shapes) for _ in range(2))
    packs: list[set[Grid | None]] = []
    evaluate = denoiser.evaluate

    def watched(evaluations: Sequence[Evaluation]) -> list[Prediction]:
        packs.append({each.grid for each in evaluations})
        return evaluate(evaluations)

    denoiser.evaluate = watched  # type: ignore[method-assign]
    run(denoiser, together)
    assert len(packs[0]) == len(SHAPES), "all in one evaluation"
    for each in alone:
        run(denoiser, [each])
    for packed, single in zip(together, alone, strict=True):
        assert_same(packed.state.x, single.state.x)
        assert packed.patch_evaluations == single.patch_evaluations


def test_a_smaller_grid_is_seen_as_in_training() -> None:
    denoiser, [condition, *_] = text_denoiser()
    network, grid = denoiser.network, Grid(2, 3, 2, 3)
    latent = torch.randn(grid.patches, grid.values)
    evaluation = Evaluation(Plan(latent, (0.3,)), condition, Memory(), grid)
    [found] = denoiser.evaluate([evaluation])
    layout = Layout.dense(1, grid.patches, latent.device, condition[Branch.CONDITIONAL])
    with torch.inference_mode(), at_grid(network, grid):
        out = network(latent, torch.tensor([0.3]), None, layout).unflatten(-1, (4, 4))
    torch.testing.assert_close(found.velocity, out[..., :3].flatten(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        ("class", Grid(2, 4, 2, 3)),
        ("text", Grid(4, 5, 2, 3)),
        ("text", Grid(4, 4, 1, 3)),
        ("text", Grid(4, 4, 2, 4)),
    ],
    ids=["class networks have one", "too many patches", "other patches", "other channels"],
)
def test_a_grid_that_a_network_cannot_work_on_is_refused(kind: str, grid: Grid) -> None:
    denoiser, [condition, *_] = denoisers()[("class", "text").index(kind)]
    plan = Plan(torch.zeros(grid.patches, grid.values), (0.5,))
    with pytest.raises(ValueError, match="cannot work on"):
        denoiser.evaluate([Evaluation(plan, condition, Memory(), grid)])


@pytest.mark.parametrize("kind", [0, 1], ids=["class", "text"])
def test_evaluating_some_patches_against_unchanged_cached_ones_is_exact(kind: int) -> None:
    denoiser, conditions = denoisers()[kind]
    latent = denoiser.grid.patchify(torch.randn(denoiser.grid.latent_shape))
    memory, some = Memory(), torch.tensor([1, 4, 5, 11])
    full = Plan(latent, (0.3,), guidance=2.0, keep=True)
    [dense] = denoiser.evaluate([Evaluation(full, conditions[0], memory)])
    partial = Plan(latent, (0.3,), patches=some, guidance=2.0, keep=True)
    [sparse] = denoiser.evaluate([Evaluation(partial, conditions[0], memory)])
    torch.testing.assert_close(sparse.velocity, dense.velocity[some], atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse.log_variance, dense.log_variance[some], atol=1e-5, rtol=0)
    assert denoiser.patches(partial) == 2 * len(some)


def test_a_partial_plan_without_memory_is_refused() -> None:
    denoiser, conditions = denoisers()[0]
    plan = Plan(torch.zeros(16, 12), (0.5,), patches=torch.tensor([2]))
    with pytest.raises(ValueError, match="cached all patches"):
        denoiser.evaluate([Evaluation(plan, conditions[0], Memory())])


def test_memory_is_made_only_when_a_plan_asks_for_it() -> None:
    denoiser, conditions = denoisers()[0]
    runs = trajectories(denoiser, conditions)
    run(denoiser, runs)
    kept = [bool(each.memory.slots) for each in runs]
    assert kept == [False, True, False, True, False, False, True, False, False]


def test_conditioning_runs_once_per_distinct_time_and_condition() -> None:
    denoiser, conditions = denoisers()[0]
    rows = []
    denoiser.network.t_embedder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    latent = torch.randn(16, 12)
    same = [Evaluation(Plan(latent, (0.25,), guidance=2.0), conditions[0], Memory()) for _ in range(5)]
    other = Evaluation(Plan(latent, (0.25, 0.5), torch.arange(16) % 2), conditions[1], Memory())
    with here():  # without parts, because each part has its own
        denoiser.evaluate([*same, other])
    assert rows == [4]  # (0.25, null), (0.25, class 0), and two times of class 3


def test_guidance_mixes_the_two_branches() -> None:
    denoiser, [first, *_] = denoisers()[0]
    latent = torch.randn(16, 12)

    def velocity(guidance: float) -> torch.Tensor:
        return denoiser.evaluate([Evaluation(Plan(latent, (0.4,), guidance=guidance), first, Memory())])[0].velocity

    null, conditional = velocity(0.0), velocity(1.0)
    torch.testing.assert_close(velocity(2.5), null + 2.5 * (conditional - null), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [class_network, text_network])
@pytest.mark.parametrize(("side", "patch", "channels"), [(8, 2, 3), (12, 4, 5), (6, 1, 2), (8, 4, 16)])
def test_any_grid_patch_size_and_channel_count(make, side: int, patch: int, channels: int) -> None:
    network = make(side, patch, channels)
    assert network.grid == Grid(side // patch, side // patch, patch, channels)
    context = network.refine(torch.randn(1, 3, 12)) if make is text_network else 1
    plan = Plan(torch.randn(network.grid.patches, network.grid.values), (0.5,))
    [found] = Denoiser(network).evaluate([Evaluation(plan, {Branch.CONDITIONAL: context}, Memory())])
    assert found.velocity.shape == (network.grid.patches, patch * patch * channels)
    assert found.log_variance.shape == (network.grid.patches, patch * patch)


def test_masked_padding_does_not_change_the_picture() -> None:
    network = text_network()
    text = torch.randn(1, 4, 12)
    padded = torch.cat([text, torch.randn(1, 3, 12)], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    plan = Plan(torch.randn(16, 12), (0.5,))
    with torch.inference_mode():
        contexts = network.refine(text, mask[:, :4]), network.refine(padded, mask)
    short, long = (
        Denoiser(network).evaluate([Evaluation(plan, {Branch.CONDITIONAL: c}, Memory())])[0].velocity for c in contexts
    )
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)


def test_patchify_is_row_major_and_inverted() -> None:
    grid = Grid(2, 3, 2, 1)
    latent = torch.arange(24.0).view(1, 4, 6)
    patches = grid.patchify(latent)
    assert patches[1].tolist() == [2, 3, 8, 9]
    assert patches[3].tolist() == [12, 13, 18, 19]
    assert torch.equal(grid.unpatchify(patches), latent)
    two = torch.randn(5, 3, 8, 4)
    assert torch.equal(Grid(4, 2, 2, 3).unpatchify(Grid(4, 2, 2, 3).patchify(two)), two)


@pytest.mark.parametrize("kind", [0, 1], ids=["class", "text"])
def test_every_sampler_runs_in_bf16_as_on_a_gpu(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The casts of the CUDA path, run on the CPU. `test_cuda` measures the precision on a GPU."""
    for module in ("patchforge.model.denoiser.serving_dtype", "patchforge.model.device.serving_dtype"):
        monkeypatch.setattr(module, lambda device, precision=None: torch.bfloat16)
    assert {name for name, _ in MIX} == set(SAMPLERS)
    denoiser, conditions = denoisers()[kind]
    evaluate, drifts = denoiser.evaluate, []

    def watched(evaluations: Sequence[Evaluation]) -> list[Prediction]:
        drifts.extend(each.plan.drift for each in evaluations if each.plan.drift is not None)
        return evaluate(evaluations)

    monkeypatch.setattr(denoiser, "evaluate", watched)
    runs = trajectories(denoiser, conditions)
    run(denoiser, runs)
    assert denoiser.pool.dtype == torch.bfloat16
    assert any(drift.any() for drift in drifts), "no kept keys and values were extrapolated"
    monkeypatch.undo()
    exact = trajectories(denoiser, conditions)
    run(Denoiser(denoiser.network), exact)
    for low, full in zip(runs, exact, strict=True):
        assert (low.state.x - full.state.x).abs().mean() < 0.05 * full.state.x.abs().mean()

"""Packs computed in parts by several threads: the same pictures, and no new kinds of failures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from patchforge.model import parallel
from patchforge.model.denoiser import Denoiser, Evaluation, Memory
from patchforge.model.pieces import CUT_ROWS, cut, fewest_rows
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import make_sampler
from patchforge.model.trajectory import Trajectory, run
from patchforge.model.types import Plan
from tests.model.tiny_networks import class_conditions, class_network, text_conditions, text_network
from tests.rounding import assert_same

CPU = torch.device("cpu")
SIDE = 16
"""Side of the latent: 64 patches, enough to cut a sequence."""
SAMPLERS = [
    ("euler", {"steps": 3, "guidance": 1.0}),
    ("adaptive", {"steps": 6, "guidance": 2.0}),
    ("dual_loop", {"steps": 2, "guidance": 2.5, "quantile": 0.5, "inner_steps": 3}),
]


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test, with enough cores, and makes small work count as large."""
    for module in ("denoiser", "parallel"):
        monkeypatch.setattr(f"patchforge.model.{module}.free_cores", lambda: 99)
    monkeypatch.setattr("patchforge.model.denoiser.fewest_rows", lambda width: CUT_ROWS)
    yield parallel.use_threads
    parallel.use_threads(parallel.default_threads())


@pytest.fixture(params=["class", "text"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return Denoiser((class_network if request.param == "class" else text_network)(SIDE))


def conditions(denoiser: Denoiser) -> list:
    return class_conditions() if hasattr(denoiser.network, "y_embedder") else text_conditions(denoiser.network)


def pictures(denoiser: Denoiser, numbers: list[int], shapes: Sequence[tuple[int, int]] = ((8, 8),)) -> list[Tensor]:
    """Draws pictures together, each with another sampler, and with one of these numbers of rows and columns."""
    runs = []
    for number in numbers:
        name, options = SAMPLERS[number]
        rows, columns = shapes[number % len(shapes)]
        grid = replace(denoiser.grid, rows=rows, columns=columns)
        noise = torch.randn(grid.latent_shape, generator=torch.Generator().manual_seed(number))
        sampler = make_sampler(name, grid, **options)
        runs.append(Trajectory.begin(sampler, conditions(denoiser)[number], grid.patchify(noise)))
    run(denoiser, runs)
    return [each.state.x for each in runs]


def test_pictures_are_the_same_in_any_number_of_parts_packed_and_alone(
    denoiser: Denoiser, team: Callable[[int], None]
) -> None:
    everyone = [0, 1, 2]
    team(1)
    expected = pictures(denoiser, everyone)
    for threads in (1, 2, 3, 5):
        team(threads)
        for packed, alone in zip(pictures(denoiser, everyone), expected, strict=True):
            assert_same(packed, alone)
        for number in everyone:
            [alone] = pictures(denoiser, [number])
            assert_same(alone, expected[number])


@pytest.mark.parametrize("shapes", [((8, 8), (4, 8), (8, 4)), ((4, 4), (8, 8), (5, 7)), ((7, 3), (3, 7), (8, 8))])
def test_so_they_are_in_different_sizes(shapes: Sequence[tuple[int, int]], team: Callable[[int], None]) -> None:
    denoiser = Denoiser(text_network(SIDE))
    team(1)
    expected = [pictures(denoiser, [number], shapes)[0] for number in range(3)]
    for threads in (1, 2, 3, 5):
        team(threads)
        for packed, alone in zip(pictures(denoiser, [0, 1, 2], shapes), expected, strict=True):
            assert_same(packed, alone)


def test_so_they_are_decoded(pipelines: dict[str, Pipeline], team: Callable[[int], None]) -> None:
    pipeline = pipelines["tiny-class"]
    latents = torch.randn(5, pipeline.grid.patches, pipeline.grid.values)
    team(1)
    expected = pipeline.decode(latents)
    for threads in (2, 3, 8):
        team(threads)
        assert torch.equal(pipeline.decode(latents), expected)


@pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["cut", "whole"])
def test_an_evaluation_that_fails_in_one_part_is_as_if_it_had_never_begun(
    denoiser: Denoiser, team: Callable[[int], None], guidance: float
) -> None:
    team(2)
    threads: set[str] = set()

    def fail_in_the_second_part(*_: object) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        if threading.current_thread().name.startswith("compute-1"):
            raise MemoryError

    latent, memory = torch.randn(64, 12), Memory()
    [condition, *_] = conditions(denoiser)
    kept = Evaluation(Plan(latent, (0.3,), guidance=guidance, keep=True), condition, memory)
    again = Evaluation(Plan(latent, (0.3,), patches=torch.arange(40), guidance=guidance), condition, memory)
    denoiser.evaluate([kept])
    [expected] = denoiser.evaluate([again])
    block: nn.Module = denoiser.network.blocks[1]
    hook = block.register_forward_pre_hook(fail_in_the_second_part)
    with pytest.raises(MemoryError):
        denoiser.evaluate([Evaluation(Plan(latent + 1, (0.9,), guidance=guidance, keep=True), condition, memory)])
    hook.remove()
    assert "compute-1" in threads
    [found] = denoiser.evaluate([again])
    assert torch.equal(found.velocity, expected.velocity)


@pytest.mark.parametrize("lengths", [[64], [64, 64], [64] * 3, [10, 10, 30], [7, 64, 64], [1], [256, 64, 33], [33] * 9])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("inside", [True, False])
def test_a_pack_is_cut_into_parts_that_hold_every_row_once(lengths: list[int], parts: int, inside: bool) -> None:
    made = cut(lengths, parts, CUT_ROWS, inside)
    rows = [(index, row) for part in made for index, first, last in part for row in range(first, last)]
    assert rows == [(index, row) for index, length in enumerate(lengths) for row in range(length)]
    assert len(made) <= min(parts, max(1, sum(lengths) // CUT_ROWS))
    for index, first, last in (piece for part in made for piece in part):
        assert first % CUT_ROWS == 0
        assert last == lengths[index] or (inside and last % CUT_ROWS == 0 and lengths[index] % 4 == 0)


def test_sequences_are_cut_only_where_it_pays() -> None:
    def made(lengths: list[int], fewest: int = CUT_ROWS, inside: bool = True) -> list[list[tuple[int, int, int]]]:
        return cut(lengths, 2, fewest, inside)

    assert made([64, 64]) == [[(0, 0, 64)], [(1, 0, 64)]]
    assert made([64]) == [[(0, 0, 32)], [(0, 32, 64)]]
    assert made([64], inside=False) == [[(0, 0, 64)]]
    assert made([64, 64, 64]) == [[(0, 0, 64), (1, 0, 32)], [(1, 32, 64), (2, 0, 64)]]
    assert made([64, 64, 64], inside=False) == [[(0, 0, 64)], [(1, 0, 64), (2, 0, 64)]]
    assert len(made([64] * 9)[0]) == 4, "half a sequence in nine is not worth meetings in every layer"
    assert made([65]) == [[(0, 0, 65)]], "rows beyond whole blocks would come out otherwise"
    assert made([64, 64], fewest=65) == [[(0, 0, 64), (1, 0, 64)]]
    assert (fewest_rows(192), fewest_rows(1152)) == (128, CUT_ROWS)


def test_a_team_returns_what_the_calls_do_in_order_and_leaves_other_threads_as_they_are() -> None:
    def told_in_another_thread() -> int:
        told: list[int] = []
        asking = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
        asking.start()
        asking.join()
        return told[0]

    torch.set_num_threads(3)
    team = parallel.Team(4)
    assert team.run([lambda number=number: number for number in range(4)]) == [0, 1, 2, 3]
    assert team.run([torch.get_num_threads] * 4) == [1] * 4
    assert (torch.get_num_threads(), told_in_another_thread()) == (3, 3)
    torch.set_num_threads(parallel.default_threads())


def test_a_failure_ends_the_waiting_of_others_and_is_the_one_that_is_raised() -> None:
    meeting, ended = threading.Barrier(3), []

    def waiting() -> None:
        try:
            meeting.wait()
        finally:
            ended.append(1)

    def failing() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parallel.Team(3).run([waiting, waiting, failing], meeting.abort)
    assert ended == [1, 1]


def test_an_interrupted_caller_waits_for_the_end_of_what_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, real = [], parallel.wait
    held, interruptions = threading.Event(), iter([KeyboardInterrupt])

    def interrupted(futures: list) -> object:
        for interruption in interruptions:
            raise interruption
        held.set()
        return real(futures)

    team = parallel.Team(1)
    monkeypatch.setattr(parallel, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        team.run([lambda: (held.wait(), ended.append(1))])
    assert ended == [1]


def test_little_work_is_done_by_two_threads_of_openmp_if_each_has_a_core_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def computed_by(count: int, kind: str | None = "known") -> set[int]:
        threads: set[int] = set()

        def call() -> Tensor:
            threads.add(torch.get_num_threads())
            return torch.ones(2)

        team.run([call] * count, kind=kind)
        return threads

    team, free = parallel.Team(4, pairs=2), 4
    monkeypatch.setattr(parallel, "free_cores", lambda: free)
    assert computed_by(1) == {1, 2}, "the first time, by both"
    assert computed_by(1) == {2}
    assert computed_by(2) == {2}
    assert computed_by(3) == {1}, "there are not so many pairs"
    assert computed_by(1, kind=None) == {1}
    free = 3
    assert computed_by(2) == {1}
    assert computed_by(1) == {2}
    free = 1
    assert computed_by(1) == {1}
    team, free = parallel.Team(4), 4
    assert computed_by(1) == {1}


def test_nor_if_two_threads_compute_other_bits_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "free_cores", lambda: 2)
    team = parallel.Team(2, pairs=1)

    def rounded() -> Tensor:
        return torch.tensor([0.0, 1 + 1e-7 * torch.get_num_threads()])

    expected = team.run([rounded])[0]
    for _ in range(3):
        [made] = team.run([rounded], kind="rounded")
        assert torch.equal(made, expected)
    assert team.run([torch.get_num_threads], kind="rounded") == [1]


def test_who_computes() -> None:
    team = parallel.crew(CPU)
    assert isinstance(team, parallel.Team)
    assert parallel.crew(torch.device("meta")) is parallel.CALLER
    assert team.run([lambda: parallel.crew(CPU)]) == [parallel.CALLER], "it would wait for itself for ever"
    with parallel.here():
        assert parallel.crew(CPU) is parallel.CALLER
        assert parallel.CALLER.run([threading.get_ident]) == [threading.get_ident()]
    assert parallel.crew(CPU) is team


FRESH = """
import os
from patchforge.model import parallel
import torch
cpu = torch.device("cpu")
print(parallel.crew(cpu).parts, torch.get_num_threads())
child = os.fork()
if not child:
    parallel.crew(cpu).run([int])
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_users_number_of_threads_holds_and_a_forked_process_has_threads_of_its_own() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["1", "1", "7"]

"""The engine benchmark: the other policies batch as described, all see the same traffic, ours changes no picture."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import count

import pytest

from patchforge.model.pipeline import Pipeline
from patchforge.service.bench import engine
from patchforge.service.bench.engine import (
    ONE,
    OURS,
    POLICIES,
    REQUEST,
    STEP,
    EngineRow,
    Served,
    alone,
    bench_engine,
    largest_difference,
    psnr_of_ours,
    rate_at,
    row,
)
from patchforge.service.bench.engine_traffic import Arrival, mixed_traffic
from patchforge.service.bench.policies import OneAtATime, RequestLevel, StepLevel
from patchforge.service.messages.samplers import Quality, preset
from patchforge.service.worker.cards import model_card
from patchforge.service.worker.scheduler import Candidate
from tests.rounding import products_are_alike

KINDS = {"a": "x", "b": "y", "c": "x", "d": "x"}


def waiting(*names: str) -> list[Candidate]:
    return [Candidate((name, 0), "m", 10) for name in names]


def served(chosen: list[Candidate]) -> str:
    return "".join(each.key[0] for each in chosen)


def test_one_at_a_time_runs_the_oldest_request_with_all_its_pictures() -> None:
    pictures = [Candidate(("a", index), "m", 10) for index in range(3)]
    assert OneAtATime().choose([*pictures, *waiting("b")]) == pictures


def test_request_level_batches_one_kind_and_no_request_joins() -> None:
    policy = RequestLevel(KINDS)
    assert served(policy.choose(waiting("a", "b", "c"))) == "ac"
    assert served(policy.choose(waiting("a", "b", "c", "d"))) == "ac"
    assert served(policy.choose(waiting("b", "c", "d"))) == "c"
    assert served(policy.choose(waiting("b", "d"))) == "b"


def test_step_level_lets_requests_join_and_kinds_take_turns() -> None:
    policy = StepLevel(KINDS)
    assert served(policy.choose(waiting("a", "b", "c"))) == "ac"
    assert served(policy.choose(waiting("a", "b", "c", "d"))) == "b"
    assert served(policy.choose(waiting("a", "b", "c", "d"))) == "acd"


@pytest.fixture(scope="module")
def traffics(pipelines: dict[str, Pipeline]) -> list[list[Arrival]]:
    return [mixed_traffic(pipelines, 4, seed) for seed in (3, 4)]


def test_traffic_repeats_with_its_seed_and_mixes_everything(pipelines: dict[str, Pipeline]) -> None:
    traffic = mixed_traffic(pipelines, 200, seed=1)
    assert traffic == mixed_traffic(pipelines, 200, seed=1)
    assert traffic != mixed_traffic(pipelines, 200, seed=2)
    assert traffic[-1].at == pytest.approx(200)  # gaps of mean 1
    assert {each.request.model for each in traffic} == set(pipelines)
    assert len({each.kind for each in traffic}) > 15
    dense = [each.job(dense=True).request.sampler for each in traffic]
    assert all(sampler.exact for sampler in dense if hasattr(sampler, "exact"))


def test_every_policy_serves_the_same_traffic_and_ours_changes_no_picture(
    pipelines: dict[str, Pipeline], traffics: list[list[Arrival]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WARM_UP", 1)
    budgets = dict.fromkeys(pipelines, 128)
    clock = partial(next, count(0.0, 0.01))  # every step takes 10 ms
    results = list(bench_engine(pipelines, traffics, [1.0], budgets, clock))
    assert [found.load for found, _ in results] == [float("inf")] * 5 + [1.0] * 5
    assert [found.policy for found, _ in results] == [*POLICIES, *POLICIES]
    for found, rounds in results:
        assert [len(served.finished) for served in rounds] == [len(arrivals) for arrivals in traffics]
        assert found.p50 <= found.p95 <= found.p99
        assert 0 < found.busy < 1.001
        assert all(each.seconds == pytest.approx(0.01 * each.evaluations) for each in rounds)
    by_policy = {found.policy: (found, served) for found, served in results}
    arrived = {policy: [served.arrived for served in rounds] for policy, (_, rounds) in by_policy.items()}
    assert arrived[OURS] == arrived[ONE]
    assert arrived[OURS][0] != arrived[OURS][1]
    packed = {found.policy: found.patches_per_evaluation for found, _ in results if found.load == float("inf")}
    assert packed[OURS] > packed[STEP] >= packed[REQUEST] >= packed[ONE]
    assert by_policy[OURS][0].patch_evaluations <= by_policy[ONE][0].patch_evaluations
    expected = [alone(pipelines, arrivals) for arrivals in traffics]
    assert largest_difference(by_policy[OURS][1], expected) <= (0 if products_are_alike() else 1e-4)
    expected[1]["300"][-1][-1, -1] += 1
    assert largest_difference(by_policy[OURS][1], expected) == pytest.approx(1, abs=1e-3)
    assert psnr_of_ours(pipelines, traffics, by_policy[OURS][1], by_policy[OURS][1]) == pytest.approx(60)


def test_presets_are_served_as_the_models_would(pipelines: dict[str, Pipeline]) -> None:
    bare, presets = (mixed_traffic(pipelines, 100, seed=1, presets=presets) for presets in (False, True))
    adaptive = [each.request for each in presets if each.request.sampler and each.request.sampler.name == "adaptive"]
    cards = [model_card(each.manifest) for each in pipelines.values()]
    usual = {preset(quality, card.sampler, card.steps)[1] for quality in Quality for card in cards}
    assert {each.steps for each in adaptive} == usual
    assert {each.guidance for each in adaptive} == {p.manifest.defaults.guidance for p in pipelines.values()}
    assert {repr(each.request.sampler) for each in bare} < {repr(each.request.sampler) for each in [*bare, *presets]}


def test_traffic_of_several_sizes_asks_for_all_and_only_equal_ones_are_batched(
    pipelines: dict[str, Pipeline],
) -> None:
    text, sizes = {"tiny-text": pipelines["tiny-text"]}, [(32, 32), (16, 16), (32, 16)]
    traffic = mixed_traffic(text, 60, seed=1, adaptive_only=True, sizes=sizes)
    assert {each.request.asked_size for each in traffic} == set(sizes)
    assert len({each.kind for each in traffic}) == 3 * 3  # in three numbers of steps
    assert all(each.request.asked_size is None for each in mixed_traffic(text, 9, seed=1))
    served = run_all(text, traffic[:12])
    assert largest_difference([served], [alone(text, traffic[:12])]) <= (0 if products_are_alike() else 1e-4)


def run_all(pipelines: dict[str, Pipeline], arrivals: list[Arrival]) -> Served:
    """Serves requests that all wait from the start."""
    return engine.serve(pipelines, OURS, arrivals, 0.0, dict.fromkeys(pipelines, 512), partial(next, count(0.0, 0.01)))


def test_traffic_for_adaptive_only_names_no_other_sampler(pipelines: dict[str, Pipeline]) -> None:
    traffic = mixed_traffic(pipelines, 50, seed=1, adaptive_only=True)
    assert {each.request.sampler.name for each in traffic if each.request.sampler} == {"adaptive"}
    assert len({each.kind for each in traffic}) == 6  # of two models, in three numbers of steps


def test_a_round_in_which_the_machine_was_slow_does_not_count() -> None:
    def served(pace: float) -> Served:
        times = {str(number): pace * (number + 1) for number in range(20)}
        return Served(dict.fromkeys(times, 0.0), {}, times, evaluations=10, patches=100, seconds=20 * pace)

    steady, measured = (row(OURS, 1.0, 0.5, [served(pace) for pace in paces]) for paces in ((1, 1, 1), (1, 9, 1)))
    assert measured == steady
    assert (steady.p50, steady.completed, steady.busy) == (10.5, 1.0, 1.0)


BASE = EngineRow(REQUEST, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def measured(capacity: float, *points: tuple[float, float]) -> list[EngineRow]:
    """Rows of loads and their p95; load 1 is two requests per second."""
    rows = [dataclasses.replace(BASE, load=load, offered=2 * load, p95=p95) for load, p95 in points]
    return [dataclasses.replace(BASE, load=math.inf, completed=capacity), *rows]


def test_the_rate_at_a_p95_is_interpolated_between_loads() -> None:
    rows = measured(9.0, (0.5, 1.0), (1.0, 3.0), (1.5, 9.0))
    assert rate_at(rows, REQUEST, 0.5) == 0
    assert rate_at(rows, REQUEST, 2.0) == pytest.approx(1.5)
    assert rate_at(rows, REQUEST, 3.0) == pytest.approx(2.0)
    assert rate_at(rows, REQUEST, 100.0) == 3.0


def test_no_rate_exceeds_the_capacity_or_a_load_with_a_higher_p95() -> None:
    assert rate_at(measured(2.5, (0.5, 1.0), (1.5, 2.0)), REQUEST, 5.0) == 2.5
    assert rate_at(measured(9.0, (0.5, 1.0), (1.0, 5.0), (1.5, 1.0)), REQUEST, 3.0) == pytest.approx(1.5)

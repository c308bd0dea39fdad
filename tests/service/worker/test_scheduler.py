"""Which pictures are evaluated: promises that hold for all arrivals, and the order within them."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchforge.service.worker.scheduler import AGEING, GUARANTEED, Candidate, Key, Scheduler

BUDGETS = {"a": 100, "b": 40}


def candidates(*named: tuple[str, int], model: str = "a", **fields: float) -> list[Candidate]:
    return [Candidate((name, 0), model, cost, **fields) for name, cost in named]


def served(chosen: list[Candidate]) -> list[str]:
    return [each.key[0] for each in chosen]


def turns(scheduler: Scheduler, waiting: list[Candidate], steps: int) -> Counter[str]:
    """Returns how often each was evaluated while all of them always wanted more."""
    return Counter(name for _ in range(steps) for name in served(scheduler.choose(waiting)))


def test_everything_that_fits_is_packed_together() -> None:
    assert served(Scheduler(BUDGETS).choose(candidates(("x", 40), ("y", 30), ("z", 30)))) == ["x", "y", "z"]


def test_a_small_one_may_fill_what_a_large_one_leaves() -> None:
    assert served(Scheduler(BUDGETS).choose(candidates(("x", 80), ("y", 60), ("z", 20)))) == ["x", "z"]


def test_one_larger_than_the_budget_runs_without_others() -> None:
    assert served(Scheduler(BUDGETS).choose(candidates(("x", 640), ("y", 64)))) == ["x"]


def test_one_to_be_alone_is_never_packed() -> None:
    scheduler = Scheduler(BUDGETS)
    waiting = [*candidates(("x", 10), ("y", 10)), Candidate(("alone", 0), "a", 10, alone=True)]
    steps = [served(scheduler.choose(waiting)) for _ in range(20)]
    assert ["alone"] in steps
    assert all(step in (["alone"], ["x", "y"]) or set(step) <= {"x", "y"} for step in steps)


def test_models_never_mix_and_share_the_steps() -> None:
    scheduler = Scheduler(BUDGETS)
    waiting = candidates(("x", 50), ("y", 50)) + candidates(("z", 40), model="b")
    steps = [served(scheduler.choose(waiting)) for _ in range(60)]
    assert all("z" not in step or step == ["z"] for step in steps)
    # A third of the guaranteed part is z's. Urgency may add more.
    assert 60 * GUARANTEED / 3 <= sum(step == ["z"] for step in steps) <= 50


def test_the_job_with_least_left_comes_first() -> None:
    waiting = [*candidates(("long", 60), remaining=900), *candidates(("short", 60), remaining=100)]
    assert served(Scheduler(BUDGETS).choose(waiting)) == ["short"]


def test_the_nearest_deadline_comes_before_the_least_work() -> None:
    waiting = [
        *candidates(("short", 60), remaining=100),
        *candidates(("later", 60), remaining=900, deadline=9.0),
        *candidates(("soon", 60), remaining=900, deadline=2.0),
    ]
    assert served(Scheduler(BUDGETS).choose(waiting)) == ["soon"]


def test_a_deadline_far_off_holds_nobody_up() -> None:
    waiting = [*candidates(("later", 60), remaining=900, deadline=86_400.0), *candidates(("short", 60), remaining=100)]
    assert served(Scheduler(BUDGETS).choose(waiting)) == ["short"]


def test_waiting_makes_a_long_one_more_urgent_than_a_newcomer() -> None:
    newcomer = candidates(("short", 60), remaining=100)
    assert served(Scheduler(BUDGETS).choose([*candidates(("long", 60), remaining=900, waited=800), *newcomer])) == [
        "short"
    ]
    long = candidates(("long", 60), remaining=900, waited=801 / AGEING)
    assert served(Scheduler(BUDGETS).choose([*newcomer, *long])) == ["long"]


def test_a_long_one_keeps_its_guaranteed_share_beside_endless_short_ones() -> None:
    scheduler = Scheduler(BUDGETS)
    steps, count = 400, 0
    long = candidates(("long", 50), remaining=10_000)
    for step in range(steps):
        newcomers = candidates(*((f"{step}-{i}", 50) for i in range(3)), remaining=50)  # each needs one evaluation
        count += "long" in served(scheduler.choose(long + newcomers))
    # There are four with equal weight: each gets a quarter of the guaranteed part, and an evaluation costs half a step.
    assert count >= steps * GUARANTEED / 4 / 0.5 - 1


@pytest.mark.parametrize("weights", [(4.0, 1.0), (1.0, 0.25)])
def test_weight_decides_between_equals_and_starves_nobody(weights: tuple[float, float]) -> None:
    heavy, light = (
        candidates((name, 100), weight=weight, remaining=1000 / weight)
        for name, weight in zip(("heavy", "light"), weights, strict=True)
    )
    counts = turns(Scheduler(BUDGETS), [*light, *heavy], 1000)
    assert counts["heavy"] > 3 * counts["light"]
    assert counts["light"] >= 1000 * GUARANTEED * 0.2 - 1


def test_nothing_to_do() -> None:
    assert Scheduler(BUDGETS).choose([]) == []


pictures = st.builds(
    Candidate,
    key=st.tuples(st.uuids().map(str), st.just(0)),
    model=st.sampled_from(sorted(BUDGETS)),
    cost=st.integers(1, 150),
    weight=st.sampled_from([0.25, 1.0, 4.0, 0.4]),
    remaining=st.floats(0, 1e6),
    waited=st.floats(0, 1e6),
    deadline=st.none() | st.floats(0, 1e3),
    alone=st.sampled_from([False, False, False, True]),
)
arrivals = st.lists(st.lists(pictures, max_size=4), min_size=1, max_size=150)
lives = st.randoms(use_true_random=False)
MOST = 12


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(arrivals, lives)
def test_everyone_is_served_soon_after_being_owed_it(coming: list[list[Candidate]], chance: Random) -> None:
    """For random arrivals, departures and costs: each is evaluated within as many steps as there are pictures."""
    scheduler = Scheduler(BUDGETS)
    live: dict[Key, Candidate] = {}
    credit: dict[Key, float] = {}
    owed_for: Counter[Key] = Counter()
    for newcomers in coming:
        live |= {each.key: each for each in newcomers[: MOST - len(live)]}
        chosen = scheduler.choose(live.values())
        check_packing(chosen, live)
        total = sum(each.weight for each in live.values())
        for key, each in live.items():
            credit[key] = credit.get(key, 0.0) + GUARANTEED * each.weight / total
            owed_for[key] += credit[key] >= each.cost / BUDGETS[each.model]
            assert owed_for[key] <= MOST
        for each in chosen:
            credit[each.key], owed_for[each.key] = 0.0, 0
            if chance.random() < 0.2:
                del live[each.key]


def check_packing(chosen: list[Candidate], live: dict[Key, Candidate]) -> None:
    assert bool(chosen) == bool(live)
    assert len({each.model for each in chosen}) <= 1
    if len(chosen) > 1:
        assert sum(each.cost for each in chosen) <= BUDGETS[chosen[0].model]
        assert not any(each.alone for each in chosen)

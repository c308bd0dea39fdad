"""Fair turns under a patch budget."""

from service.worker.scheduler import Candidate, Scheduler


def candidates(*named: tuple[str, int], model: str = "m") -> list[Candidate]:
    return [Candidate((name, 0), model, cost) for name, cost in named]


def served(chosen: list[Candidate]) -> list[str]:
    return [each.key[0] for each in chosen]


def test_everything_that_fits_is_packed_together() -> None:
    assert served(Scheduler(100).choose(candidates(("a", 40), ("b", 30), ("c", 30)))) == ["a", "b", "c"]


def test_who_was_left_out_comes_first_next_time() -> None:
    scheduler = Scheduler(100)
    waiting = candidates(("a", 60), ("b", 60), ("c", 60))
    assert [served(scheduler.choose(waiting)) for _ in range(4)] == [["a"], ["b"], ["c"], ["a"]]


def test_a_small_one_may_fill_what_a_large_one_leaves() -> None:
    assert served(Scheduler(100).choose(candidates(("a", 80), ("b", 60), ("c", 20)))) == ["a", "c"]


def test_one_larger_than_the_budget_runs_alone() -> None:
    assert served(Scheduler(10).choose(candidates(("a", 64), ("b", 64)))) == ["a"]


def test_models_take_turns_and_never_mix() -> None:
    scheduler = Scheduler(1000)
    waiting = candidates(("a", 1), ("b", 1), model="x") + candidates(("c", 1), model="y")
    assert [served(scheduler.choose(waiting)) for _ in range(3)] == [["a", "b"], ["c"], ["a", "b"]]


def test_a_burst_queues_behind_a_running_one() -> None:
    scheduler = Scheduler(100)
    running = candidates(("old", 50))
    scheduler.choose(running)
    burst = candidates(*((f"new{i}", 50) for i in range(6)))
    turns = [served(scheduler.choose(running + burst)) for _ in range(4)]
    assert turns[0] == ["old", "new0"]
    assert sum("old" in turn for turn in turns) >= 1
    assert {name for turn in turns for name in turn} == {"old", *(f"new{i}" for i in range(6))}


def test_nothing_to_do() -> None:
    assert Scheduler(10).choose([]) == []

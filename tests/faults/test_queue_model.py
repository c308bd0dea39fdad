"""The queue and its reference model agree after every random sequence of calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from patchforge.service.queue import batch_results, connection
from tests.faults.batch_machine import BatchMachine
from tests.faults.queue_rig import Rig


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "LOOK_SECONDS", 3600.0)  # what `Rig.just_looked` says counts on any machine
        rig = Rig(tmp_path_factory.mktemp("model"))
        patch.setattr(batch_results, "MOVED_LINES", 1)  # each line's result has an object of its own
        yield rig
    rig.close()


def explore(rig: Rig, runs: int, steps: int, *, derandomize: bool) -> Counter[str]:
    """Counts what happened in all runs; none found a difference."""
    rig.tally.clear()
    profile = settings(
        max_examples=runs,
        stateful_step_count=steps,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
    )
    run_state_machine_as_test(lambda: BatchMachine(rig), settings=profile)  # type: ignore[no-untyped-call]
    assert rig.tally["runs"] >= runs
    return rig.tally


def test_random_interleavings(rig: Rig) -> None:
    tally = explore(rig, 300, 30, derandomize=True)
    # Only what is common: which runs these are also depends on what else the process has imported.
    for kind in (
        "reclaims",
        "stale acts refused",
        "special claims",
        "counts of held jobs",
        "expired unasked",
        "cancelled unasked",
        "taken over in turn",
        "claims of idle workers",
        "deliveries together",
        "rosters",
        "feed: queued",
    ):
        assert tally[kind], f"no {kind}: the runs were in vain"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_random_interleavings(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    tally = explore(rig, 2000, 50, derandomize=False)
    with capsys.disabled():
        print("\nqueue model, no violation:", ", ".join(f"{count} {kind}" for kind, count in sorted(tally.items())))
    assert tally["failed unasked"], "no job was dead-lettered"
    assert tally["server kills"]
    assert tally["batch: completed"]
    assert tally["batch: cancelled"]
    assert tally["batches deleted"]
    for kind in (
        "told at last",
        "submit: full",
        "submit: crowded",
        "feed: stale",
        "batch: finalizing",
        "results moved",
        "results: late",
        "results: away",
    ):
        assert tally[kind], f"no {kind}"

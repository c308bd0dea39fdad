"""Which accepted jobs are looked for after a failover."""

from __future__ import annotations

import pytest

from patchforge.service.queue import accepted
from patchforge.service.queue.accepted import KEPT_SECONDS, LOOKS, MOST, Accepted


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accepted, "time", clock)
    return clock


def test_jobs_are_doubtful_only_after_a_change(clock: Clock) -> None:
    jobs = Accepted(3600)
    jobs.note("one")
    assert jobs.doubtful("a") == []
    assert jobs.doubtful("b") == ["one"]
    jobs.looked(["one"])
    assert jobs.doubtful("b") == []


def test_a_job_of_a_repeated_key_is_lost_once(clock: Clock) -> None:
    jobs = Accepted(3600)
    jobs.doubtful("a")
    jobs.note("one")
    jobs.note("one")
    assert jobs.doubtful("b") == ["one"]


def test_looks_end(clock: Clock) -> None:
    jobs = Accepted(3600)
    jobs.doubtful("a")
    jobs.note("one")
    for _ in range(LOOKS):
        assert jobs.doubtful("b") == ["one"]
        jobs.looked([])
    clock.now += KEPT_SECONDS + 1
    assert jobs.doubtful("b") == []


def test_while_nobody_could_ask_jobs_are_kept_until_they_may_have_expired(clock: Clock) -> None:
    jobs = Accepted(600)
    jobs.doubtful("a")
    jobs.note("old")
    clock.now += 400
    jobs.note("new")
    clock.now += 300
    assert jobs.doubtful("b") == ["new"]


def test_memory_has_a_bound(clock: Clock) -> None:
    jobs = Accepted(3600)
    jobs.doubtful("a")
    for number in range(MOST + 5):
        jobs.note(str(number))
    assert len(jobs.doubtful("b")) == MOST

"""How work and times become shares, and measurements a speed."""

from __future__ import annotations

import math

import pytest

from patchforge.service.worker.pace import HEADROOM, Backlog, Speed, Work, shares


def of(*works: tuple[float, float]) -> list[float]:
    """Shares of flexible works, given as (seconds, due) with `due` before the headroom is taken off."""
    return shares([Work(seconds, due / HEADROOM, True) for seconds, due in works])


def test_whatever_fits_is_left_alone() -> None:
    assert of((1, 1), (2, 3), (3, 6)) == [1, 1, 1]
    assert of((1, math.inf)) == [1]
    assert shares([]) == []


def test_all_that_is_due_by_the_tightest_time_gets_the_same_share() -> None:
    assert of((1, 10), (3, 2), (4, 3.5)) == pytest.approx([1, 0.5, 0.5])
    assert of((2, 1), (2, 2.5)) == pytest.approx([0.5, 0.75])


def test_what_is_late_gets_nothing_and_the_rest_what_is_left() -> None:
    assert of((5, -1), (2, 1), (1, 9)) == pytest.approx([0, 0.5, 1])


def test_where_time_is_short_more_of_it_goes_where_it_brings_more() -> None:
    def of_gains(average: float, *works: tuple[float, float]) -> list[float]:
        due = average * sum(seconds for seconds, _ in works) / HEADROOM
        return shares([Work(seconds, due, True, gain) for seconds, gain in works])

    assert of_gains(0.5, (1, 1), (1, 3)) == pytest.approx([0.25, 0.75])
    assert of_gains(0.6, (1, 1), (1, 9)) == pytest.approx([0.2, 1]), "no work is done twice"
    assert of_gains(0.5, (2, 1), (4, 1), (2, 2)) == pytest.approx([0.4, 0.4, 0.8])
    assert of_gains(1.0, (1, 0.1), (1, 9)) == [1, 1]
    assert of_gains(0.5, (1, 0), (1, 2)) == [0, 1]
    assert of_gains(0.5, (1, 0), (1, 0)) == [0, 0]


def test_fixed_work_takes_time_but_nothing_is_lowered_for_its_sake() -> None:
    late = Work(10, -1, False)
    assert shares([late, Work(1, 2 * 11 / HEADROOM, True)]) == [1, 1]
    assert shares([Work(3, 1, False), Work(2, 4 / HEADROOM, True)]) == pytest.approx([1, 0.5])
    assert shares([late, Work(0, 5, True)]) == [1, 1]


def test_the_speed_is_a_line_through_the_newest_measurements() -> None:
    speed = Speed()
    assert not speed.known
    speed.evaluated(100, 0.5)
    assert speed.evaluation(200) == pytest.approx(1.0), "with one measurement it goes through zero"
    for patches in (100, 300, 500):
        speed.evaluated(patches, 0.1 + 0.001 * patches)
    for _ in range(300):
        speed.evaluated(100, 0.3)
        speed.evaluated(300, 0.5)
    speed.decoded(2, 0.04)
    assert speed.known
    assert speed.evaluation(0) == pytest.approx(0.2, rel=0.01)
    assert speed.per_patch(200) == pytest.approx(0.4 / 200, rel=0.01)
    assert speed.run([100, 300], 2) == pytest.approx(0.3 + 0.5 + 0.04, rel=0.01)


def test_what_a_picture_takes_alone_is_not_forgotten_under_load() -> None:
    speed = Speed()
    speed.decoded(1, 0.1)
    for _ in range(5):
        speed.evaluated(64, 0.02)
    alone = speed.run([64, 64])
    for _ in range(500):
        speed.evaluated(1000, 0.2, others=0.05)
    assert speed.run([64, 64]) == pytest.approx(alone)
    assert speed.drag == pytest.approx(1.25)
    speed.began(0.03)
    assert speed.run([64, 64]) == pytest.approx(alone + 0.03)


def test_a_pause_does_not_look_like_a_slow_device() -> None:
    speed = Speed()
    speed.decoded(1, 0.1)
    for _ in range(20):
        speed.evaluated(100, 0.5)
    speed.evaluated(100, 3600.0)
    assert speed.evaluation(100) < 0.7
    for _ in range(100):
        speed.evaluated(100, 2.0)
    assert speed.evaluation(100) == pytest.approx(2.0, rel=0.05), "what lasts is believed"


def test_smaller_evaluations_keep_most_of_the_throughput() -> None:
    speed = Speed()
    speed.decoded(1, 0.1)
    for _ in range(5):
        for patches in (100, 1000):
            speed.evaluated(patches, 0.005 + 0.0001 * patches)
    smaller = speed.smallest_pack(1000)
    assert 250 <= smaller < 600
    assert speed.per_patch(smaller) <= speed.per_patch(1000) / 0.9 + 1e-9
    assert Speed().smallest_pack(64) == 64


@pytest.mark.parametrize("measured", [[(100, 0.9), (300, 0.1)], [(100, 0.1), (300, 0.9)]])
def test_no_measurement_makes_it_negative(measured: list[tuple[int, float]]) -> None:
    speed = Speed()
    for patches, seconds in measured:
        speed.evaluated(patches, seconds)
    assert min(speed.evaluation(patches) for patches in (0, 1, 100, 1000)) >= 0


def test_waiting_jobs_came_at_regular_intervals() -> None:
    works = Backlog(jobs=3, oldest=6.0).works(seconds=0.5, due=10.0)
    assert [work.due for work in works] == pytest.approx([4, 6, 8])
    assert {work.seconds for work in works} == {0.5}
    assert len(Backlog(jobs=0.5, oldest=1.0).works(1.0, 1.0)) == 1, "shared with another worker"

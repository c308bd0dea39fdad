"""Pictures end when their time is up, or get less work under load; at low load nothing changes.

The clock counts the patches that the engine evaluates, a thousand to the second, and the evaluations if they cost more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from copy import copy
from typing import Any

import numpy as np
import pytest
import torch

from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.manifest import SamplerChoice
from patchforge.service.errors import TooLittleTime
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.messages.schemas import Job, SavingsReport
from patchforge.service.queue.records import Served
from patchforge.service.worker.cards import model_card
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobDone
from patchforge.service.worker.pace import Backlog
from patchforge.service.worker.pacer import Pacer
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Candidate, Scheduler
from tests.service.worker.jobs import job
from tests.service.worker.test_engine import pixels, run

DENSE = {"name": "adaptive", "tolerance": 0.0, "skip_tolerance": 0.0}
USUAL = 8 * 2 * 16 / 1000
"""Seconds of a dense run of `wish`."""


class Counting(Scheduler):
    """Counts the evaluations, each before it is made."""

    evaluations = 0

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        chosen = super().choose(candidates)
        self.evaluations += bool(chosen)
        return chosen


class Busy:
    """An engine, and a clock that its work moves."""

    def __init__(
        self,
        pipelines: dict[str, Pipeline],
        target: float | None = None,
        step: int = 4096,
        floor: float = 0.5,
        overhead: float = 0.0,
    ) -> None:
        """`overhead`: seconds of any evaluation, however small."""
        budgets = dict.fromkeys(pipelines, step)
        self.pacer = Pacer(pipelines, budgets, floor, target)
        self.overhead, self.scheduler = overhead, Counting(budgets, self.pacer.limits)
        self.engine = Engine(
            pipelines,
            self.scheduler,
            PreviewPace(0.0, math.inf),
            1 << 30,
            self.pacer,
            lambda: self.now,
        )
        for seed in range(2):
            self.engine.admit(wish(seed=seed))
            run(self.engine)  # now the speed is known

    @property
    def now(self) -> float:
        return self.engine.evaluated / 1000 + self.overhead * self.scheduler.evaluations

    def draw(self, *jobs: Job) -> tuple[list[Any], dict[str, SavingsReport]]:
        for each in jobs:
            self.engine.admit(each)
        outcomes = run(self.engine)
        return outcomes, {each.job_id: each.report for each in outcomes if isinstance(each, JobDone)}


def wish(degradable: bool = False, waited: float = 0.0, **fields: Any) -> Job:
    """A job as the gateway submits it, with the sampler of `standard` or that of the fields."""
    given = {"sampler": {"name": "adaptive", "tolerance": 0.2}, "steps": 8, "guidance": 2.0, "previews": False} | fields
    return job(**given).model_copy(update={"degradable": degradable, "created_at": 10.0, "claimed_at": 10.0 + waited})


@pytest.fixture
def plain(pipelines: dict[str, Pipeline]) -> Busy:
    """Load lowers nothing here."""
    return Busy(pipelines)


def test_with_time_enough_a_picture_is_bit_for_bit_what_it_is_without(plain: Busy) -> None:
    free, timed = wish(), wish(finish_within_seconds=10 * USUAL)
    outcomes, reports = plain.draw(free, timed)
    assert np.array_equal(pixels(outcomes, free.id), pixels(outcomes, timed.id))
    assert (reports[timed.id].lowered_by, reports[timed.id].finished_in_time) == (None, True)
    assert (reports[free.id].lowered_by, reports[free.id].finished_in_time) == (None, None)
    assert reports[timed.id].images[0].path == []


@pytest.mark.parametrize("sampler", [DENSE, "euler", "dual_loop"], ids=["adaptive", "euler", "dual_loop"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_picture_is_finished_by_its_time_and_its_path_repeats_it(plain: Busy, sampler: Any, share: float) -> None:
    _, reports = plain.draw(free := wish(sampler=sampler))
    within = share * reports[free.id].patch_evaluations / 1000
    outcomes, reports = plain.draw(timed := wish(sampler=sampler, finish_within_seconds=within))
    report = reports[timed.id]
    assert (report.finished_in_time, report.lowered_by) == (True, "time")
    assert report.duration_seconds <= within + 2.5, "which it has waited"
    [image] = report.images
    assert image.path
    assert image.asked_patch_evaluations is not None
    assert image.asked_patch_evaluations > image.patch_evaluations
    assert image.predicted_error is not None

    again, _ = plain.draw(same := wish(sampler=sampler, path=[each.model_dump() for each in image.path]))
    assert np.array_equal(pixels(again, same.id), pixels(outcomes, timed.id))


def test_the_more_time_the_more_work(plain: Busy) -> None:
    spent = []
    for share in (0.2, 0.5, 2.0):
        _, reports = plain.draw(timed := wish(sampler=DENSE, finish_within_seconds=share * USUAL))
        spent.append(reports[timed.id].patch_evaluations)
    assert spent == sorted(spent)
    assert len(set(spent)) == 3


def test_several_with_one_time_are_all_finished_by_then(plain: Busy) -> None:
    jobs = [wish(finish_within_seconds=4 * USUAL, seed=seed) for seed in range(6)]
    _, reports = plain.draw(*jobs)
    assert all(report.finished_in_time for report in reports.values())
    assert {report.lowered_by for report in reports.values()} == {"load"}, "alone there would be time enough"


def test_what_is_late_already_is_made_at_the_floor(plain: Busy) -> None:
    late = wish(sampler=DENSE, finish_within_seconds=1.0, waited=2.0)
    lowest = wish(sampler=DENSE, steps=4)
    outcomes, reports = plain.draw(late, lowest)
    assert np.array_equal(pixels(outcomes, late.id), pixels(outcomes, lowest.id))
    assert reports[late.id].finished_in_time is False
    assert reports[lowest.id].lowered_by is None


def test_time_counts_from_acceptance_over_all_claims(plain: Busy) -> None:
    waited = 0.9
    _, reports = plain.draw(timed := wish(finish_within_seconds=waited + 0.5 * USUAL, waited=waited))
    assert reports[timed.id].finished_in_time
    assert reports[timed.id].patch_evaluations < 0.6 * USUAL * 1000


def test_under_load_pictures_that_may_be_are_lowered_together_and_no_other(pipelines: dict[str, Pipeline]) -> None:
    busy = Busy(pipelines, target=5.0, step=64)
    jobs = [wish(degradable=True, seed=seed) for seed in range(16)]
    fixed = wish(seed=5)
    outcomes, reports = busy.draw(*jobs, fixed)
    lowered = [reports[each.id] for each in jobs]
    assert {report.lowered_by for report in lowered} == {"load"}
    assert {report.finished_in_time for report in lowered} == {None}
    steps = {(change.steps, change.tolerance) for report in lowered for change in report.images[0].path[:1]}
    assert len(steps) == 1, "all the same, to begin with"
    assert reports[fixed.id].lowered_by is None
    assert reports[fixed.id].images[0].path == []

    path = reports[jobs[3].id].images[0].path
    again, _ = busy.draw(same := wish(seed=3, path=[each.model_dump() for each in path]))
    assert np.array_equal(pixels(again, same.id), pixels(outcomes, jobs[3].id))


def test_under_load_more_work_goes_to_pictures_that_are_further_from_their_end(pipelines: dict[str, Pipeline]) -> None:
    busy = Busy(pipelines, target=5.0)
    for seed in range(16):
        busy.engine.admit(wish(degradable=True, sampler=DENSE, seed=seed))
    busy.engine.step()
    begun = [picture for live in busy.engine.jobs.values() for picture in live.pictures]
    assert {picture.trajectory.state.evaluations for picture in begun} == {1}
    for picture, deviation in zip(begun, 8 * [1.0, 2.0], strict=True):
        picture.difficulty = torch.full_like(picture.difficulty, deviation**2)
    busy.pacer.target = 2.0
    easy, hard, *_ = [each.patches for each in busy.pacer.allowances(busy.engine.jobs.values()).values()]
    assert hard == pytest.approx(2 * easy)


def test_load_lowers_nothing_below_the_floor(pipelines: dict[str, Pipeline]) -> None:
    for floor, steps, guidance in ((0.5, 4, 2.0), (0.75, 6, 2.0), (0.375, 3, 2.0), (0.3, 4, 1.0)):
        busy = Busy(pipelines, target=1e-6, floor=floor)
        lowest = wish(sampler=DENSE, steps=steps, guidance=guidance, seed=2)
        outcomes, reports = busy.draw(worst := wish(sampler=DENSE, degradable=True, seed=2), lowest)
        assert np.array_equal(pixels(outcomes, worst.id), pixels(outcomes, lowest.id)), floor
        assert reports[worst.id].lowered_by == "load"


@pytest.mark.parametrize("target", [None, 5.0])
def test_at_low_load_pictures_are_bit_for_bit_what_they_are_without(
    pipelines: dict[str, Pipeline], plain: Busy, target: float | None
) -> None:
    busy = Busy(pipelines, target)
    for seed in range(3):
        pair = [wish(degradable=True, seed=seed + 10 * number) for number in range(2)]
        outcomes, reports = busy.draw(*pair)
        expected, _ = plain.draw(*pair)
        for each in pair:
            assert np.array_equal(pixels(outcomes, each.id), pixels(expected, each.id))
            assert reports[each.id].lowered_by is None


def test_jobs_that_wait_for_a_worker_count_as_load(pipelines: dict[str, Pipeline]) -> None:
    busy = Busy(pipelines, target=5.0, step=64)
    busy.engine.admit(wish(degradable=True))
    assert busy.pacer.allowances(busy.engine.jobs.values()) == {}
    busy.pacer.backlogs = {"tiny-class": Backlog(20, 0.0), "unknown": Backlog(3, 0.0)}
    assert len(busy.pacer.allowances(busy.engine.jobs.values())) == 1
    run(busy.engine)


def test_pictures_that_can_wait_lower_no_other(pipelines: dict[str, Pipeline]) -> None:
    """Those of batches: low priority, and their own quality is fixed."""
    for priority, lowered in (("low", None), ("normal", "load")):
        others = [wish(seed=seed, sampler=DENSE, priority=priority, waited=100.0) for seed in range(10)]
        busy = Busy(pipelines, target=5.0, step=64)
        _, reports = busy.draw(*others, hurried := wish(degradable=True, sampler=DENSE))
        assert reports[hurried.id].lowered_by == lowered, priority


def test_the_seconds_of_a_picture_are_known_once_one_was_drawn(pipelines: dict[str, Pipeline]) -> None:
    busy = Busy(pipelines)
    assert busy.pacer.usual_seconds("tiny-text") is None
    assert busy.pacer.least_seconds("tiny-text", busy.now) is None
    usual = busy.pacer.usual_seconds("tiny-class")
    found = busy.pacer.least_seconds("tiny-class", busy.now)
    assert usual is not None
    assert found is not None
    least, further = found
    assert 0 < least <= usual
    assert further == pytest.approx(least, rel=0.1), "by this clock pictures gain nothing from being drawn together"
    assert busy.pacer.least_seconds("tiny-class", busy.now + 3600) is None, "too long ago to refuse anything"
    busy.pacer.backlogs = {"tiny-class": Backlog(2, 0.0)}
    after_others = busy.pacer.least_seconds("tiny-class", busy.now)
    assert after_others == pytest.approx((3 * least, further), rel=0.1)


@pytest.mark.parametrize(("step", "together"), [(4096, True), (32, False)])
def test_what_can_be_met_by_pictures_together_is_accepted_and_no_less(
    pipelines: dict[str, Pipeline], step: int, together: bool
) -> None:
    """One evaluation has room for all pictures of a request, or for one."""
    own = copy(pipelines["tiny-class"])
    defaults = own.manifest.defaults
    choice = {"sampler": SamplerChoice(**DENSE), "steps": 8, "guidance": 2.0}  # what it costs is known exactly
    own.manifest = own.manifest.model_copy(update={"defaults": defaults.model_copy(update=choice)})
    busy = Busy({"tiny-class": own}, step=step, overhead=0.05)
    for n in (1, 4, 2):
        busy.draw(wish(n=n, sampler=DENSE))
    card = model_card(own.manifest)
    first, further = busy.pacer.least_seconds(card.name, busy.now) or (0.0, 0.0)
    fleet = Fleet([Served([card.model_copy(update={"least_seconds": first, "least_seconds_more": further})])])

    _, reports = busy.draw(lowest := wish(n=4, finish_within_seconds=1e-3, sampler=DENSE))
    least = reports[lowest.id].duration_seconds - lowest.started_at + lowest.created_at
    assert (least < 3 * first) is together
    with pytest.raises(TooLittleTime) as refused:
        fleet.check_time(wish(n=4, finish_within_seconds=0.9 * least, sampler=DENSE).request)
    [told] = re.findall(r"[\d.]+", refused.value.message)
    assert float(told) == pytest.approx(least, rel=0.05), "it is told in two digits"

    enough = wish(n=4, finish_within_seconds=1.3 * least, sampler=DENSE)
    fleet.check_time(enough.request)
    _, reports = busy.draw(enough)
    assert reports[enough.id].finished_in_time

"""The engine keeps each picture within its budget, beside others that have none, and repeats it from its path."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from patchforge.model.pipeline import Pipeline
from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.schemas import SavingsReport
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobDone, PatchesMade, PreviewMade
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from tests.service.worker.jobs import job
from tests.service.worker.test_engine import pixels, run

ADAPTIVE = {"name": "adaptive", "tolerance": 0.0, "skip_tolerance": 0.0}
PATCHES = 16


@pytest.fixture
def engine(pipelines: dict[str, Pipeline]) -> Engine:
    return Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), 1 << 30)


def wish(**fields: Any) -> Any:
    return job(**{"sampler": ADAPTIVE, "steps": 8, "guidance": 2.0} | fields)


def reports(outcomes: list[Any]) -> dict[str, SavingsReport]:
    return {each.job_id: each.report for each in outcomes if isinstance(each, JobDone)}


@pytest.mark.parametrize("budget", [PATCHES, 40, 100, 200])
def test_a_budget_is_kept_and_its_path_repeats_the_picture(engine: Engine, budget: int) -> None:
    free, held = wish(seed=4), wish(seed=4, budget=budget)
    for each in (free, held):
        engine.admit(each)
    outcomes = run(engine)
    report = reports(outcomes)
    assert report[free.id].patch_evaluations == 8 * 2 * PATCHES
    assert report[free.id].images[0].path == []
    [image] = report[held.id].images
    assert budget / 2 < image.patch_evaluations <= budget
    assert image.dense_patch_evaluations == 8 * 2 * PATCHES
    assert min(image.finished_at) > 0
    assert image.path
    assert engine.caches.used == 0

    again = wish(seed=4, path=[change.model_dump() for change in image.path])
    engine.admit(again)
    repeated = run(engine)
    assert np.array_equal(pixels(repeated, again.id), pixels(outcomes, held.id))
    assert reports(repeated)[again.id].images[0].path == image.path


def test_a_landing_finishes_every_patch_and_says_how_good_it_is(engine: Engine) -> None:
    held = wish(sampler="euler", budget=5 * PATCHES)  # two evaluations of both branches, and not a third
    engine.admit(held)
    outcomes = run(engine)
    [image] = reports(outcomes)[held.id].images
    assert image.patch_evaluations == 4 * PATCHES
    assert [change.steps for change in image.path] == [0]
    assert image.landing_error is not None
    assert image.landing_error > 0
    finished = [each for each in outcomes if isinstance(each, PatchesMade)]
    assert sum(len(each.finished.patches) for each in finished) == PATCHES
    assert finished[-1].finished.finished_share == 1


def test_previews_count_the_evaluations_of_the_shorter_path(engine: Engine) -> None:
    held = wish(budget=100)
    engine.admit(held)
    shown = [each.preview for each in run(engine) if isinstance(each, PreviewMade)]
    assert shown
    assert all(each.evaluation <= each.evaluations < 8 for each in shown)


def test_too_small_a_budget_is_refused_at_admission(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.admit(wish(budget=PATCHES - 1))
    assert refused.value.field == "budget"
    assert engine.jobs == {}


@pytest.mark.parametrize(
    ("sampler", "change"),
    [(ADAPTIVE, {"evaluation": 0, "steps": 0}), ("dual_loop", {"evaluation": 0, "steps": 2})],
    ids=["lands before the first evaluation", "has no other steps"],
)
def test_a_path_that_cannot_be_taken_is_refused_at_admission(engine: Engine, sampler: Any, change: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.admit(wish(sampler=sampler, path=[change]))
    assert refused.value.field == "path"
    assert engine.jobs == {}

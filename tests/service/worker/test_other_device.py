"""The engine on a device that is not the CPU."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchforge.model.pipeline import Pipeline
from patchforge.service.messages.schemas import Job
from patchforge.service.messages.source import Source
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobDone, Outcome, PictureMade, PreviewMade
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from tests.pretend_device import PRETENDED, PretendDevice
from tests.service.gateway.pictures import encoded, gradient
from tests.service.worker.jobs import job


def engine(pipelines: dict[str, Pipeline]) -> Engine:
    return Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), 1 << 30)


@pytest.fixture
def there(pretend_device: PretendDevice, bundle_dir: Path) -> Engine:
    return engine({name: Pipeline.open(bundle_dir / name, PRETENDED) for name in ("tiny-class", "tiny-text")})


def run(engine: Engine, jobs: list[tuple[Job, Source | None]]) -> list[Outcome]:
    for each, source in jobs:
        engine.admit(each, source)
    outcomes: list[Outcome] = []
    while engine.jobs:
        outcomes += engine.step()
    return outcomes


def test_jobs_of_all_kinds_end_as_on_the_cpu(there: Engine, pipelines: dict[str, Pipeline]) -> None:
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    picture = encoded(gradient(32, 32))
    jobs: list[tuple[Job, Source | None]] = [
        (job(n=2, sampler="adaptive", steps=6), None),
        (job(model="tiny-text", sampler={"name": "dual_loop", "quantile": 0.4, "inner_steps": 4}), None),
        (job(model="tiny-text", sampler={"name": "adaptive", "small_until": 0.5}, steps=4), None),
        (job(image="sha256:x", mask="sha256:x", sampler="adaptive"), Source(picture, encoded(left))),
        (job(image="sha256:x", strength=0.5, sampler="adaptive"), Source(picture, None)),
    ]
    found, expected = (run(each, jobs) for each in (there, engine(pipelines)))
    for one, other in zip(reports(found), reports(expected), strict=True):
        assert one == other
    made, wanted = drawn(found), drawn(expected)
    assert len(made) == 6
    for key, pixels in wanted.items():
        assert np.abs(made[key] - pixels).max() <= 1
    assert any(isinstance(each, PreviewMade) for each in found)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("euler", [1, 1, 2, 2]),  # once per step for the status, and at the end for finished pictures
        ({"name": "adaptive", "tolerance": 0.0, "skip_tolerance": 0.0}, [2, 2, 3, 2]),  # once more for what to evaluate
    ],
)
def test_a_step_waits_for_all_pictures_at_once(
    there: Engine, pretend_device: PretendDevice, sampler: str | dict[str, object], expected: list[int]
) -> None:
    for number in range(5):
        there.admit(job(seed=number, sampler=sampler, steps=3 + number % 2, previews=False))
    waits = []
    while there.jobs:
        pretend_device.waits.clear()
        there.step()
        waits.append(pretend_device.waits.total())
    assert waits == expected


def reports(outcomes: list[Outcome]) -> list[tuple[int, list[int]]]:
    ended = sorted((each for each in outcomes if isinstance(each, JobDone)), key=lambda each: each.job_id)
    return [(each.report.patch_evaluations, each.report.images[0].finished_at) for each in ended]


def drawn(outcomes: list[Outcome]) -> dict[tuple[str, int], np.ndarray]:
    return {
        (each.job_id, each.index): np.asarray(Image.open(BytesIO(each.data))).astype(int)
        for each in outcomes
        if isinstance(each, PictureMade)
    }

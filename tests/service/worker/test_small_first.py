"""Pictures that are drawn at half the size first, in the engine."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO

import numpy as np
from PIL import Image

from patchforge.service.messages.source import Source
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobBroken, JobDone, PatchesMade, PictureMade, PreviewMade
from tests.service.gateway.pictures import encoded, gradient
from tests.service.worker.jobs import job
from tests.service.worker.test_engine import engine, pixels, run

__all__ = ["engine"]

SMALL_FIRST = {"name": "adaptive", "tolerance": 0.0, "skip_tolerance": 0.0, "small_until": 0.5}
ASKED = {"model": "tiny-text", "sampler": SMALL_FIRST, "steps": 4, "guidance": 3.0}
WHOLE = 3 * 4 * 2 + 2 * 16 * 2


def test_previews_show_the_small_picture_until_it_is_enlarged(engine: Engine) -> None:
    engine.admit(job(**ASKED))
    outcomes = run(engine)
    previews = [outcome.preview for outcome in outcomes if isinstance(outcome, PreviewMade)]
    sizes = [Image.open(BytesIO(b64decode(preview.b64_png))).size for preview in previews]
    assert sizes == [(32, 32)] * 4
    assert [max(preview.times) for preview in previews] == [0.125, 0.25, 0.5, 0.75]
    assert {len(preview.times) for preview in previews} == {16}
    assert [preview.patch_evaluations for preview in previews] == [8, 16, 24, 56]
    assert all(preview.patch_evaluations <= preview.dense_patch_evaluations <= 128 for preview in previews)
    [finished] = [outcome.finished for outcome in outcomes if isinstance(outcome, PatchesMade)]
    assert finished.evaluation == finished.evaluations == 5
    assert len(finished.patches) == 16


def test_the_report_counts_small_patches_as_what_they_cost(engine: Engine) -> None:
    engine.admit(job(**ASKED, n=2))
    [done] = [outcome for outcome in run(engine) if isinstance(outcome, JobDone)]
    report = done.report
    assert (report.patches, report.patch_evaluations, report.dense_patch_evaluations) == (16, 2 * WHOLE, 2 * 128)
    assert [image.finished_at for image in report.images] == [[5] * 16] * 2
    assert engine.caches.used == 0


def test_packed_with_others_it_is_the_picture_made_alone(engine: Engine) -> None:
    mix = [
        job(**ASKED),
        job(**ASKED | {"steps": 7, "seed": 3}),
        job(**ASKED | {"sampler": "adaptive"}),
        job(**ASKED, width=16, height=16),
    ]
    for each in mix:
        engine.admit(each)
    together = run(engine)
    assert not [outcome for outcome in together if isinstance(outcome, JobBroken)]
    for each in mix:
        engine.admit(each)
        assert np.array_equal(pixels(run(engine), each.id), pixels(together, each.id))


def test_a_budget_is_kept_and_its_path_repeats_the_picture(engine: Engine) -> None:
    for budget in (16, 40, 60):
        first = job(**ASKED, budget=budget)
        engine.admit(first)
        outcomes = run(engine)
        [done] = [outcome for outcome in outcomes if isinstance(outcome, JobDone)]
        [image] = done.report.images
        assert image.patch_evaluations <= budget
        assert image.path
        again = job(**ASKED, path=[change.model_dump() for change in image.path])
        engine.admit(again)
        assert np.array_equal(pixels(run(engine), again.id), pixels(outcomes, first.id))


def test_an_edited_picture_is_drawn_as_without_it(engine: Engine) -> None:
    """Also where patches may finish on what their first evaluation changes."""
    drawn = []
    for small_until in (0.5, 0.0):
        sampler = {"name": "adaptive", "tolerance": 0.5, "small_until": small_until}
        edit = job(**ASKED | {"sampler": sampler, "steps": 6}, image="sha256:x", strength=0.7)
        engine.admit(edit, Source(encoded(gradient(32, 32)), None))
        outcomes = run(engine)
        [done] = [outcome for outcome in outcomes if isinstance(outcome, JobDone)]
        drawn.append((pixels(outcomes, edit.id).tolist(), done.report.images[0].finished_at))
    assert drawn[0] == drawn[1]


def test_pictures_without_previews_are_the_same(engine: Engine) -> None:
    drawn = []
    for previews in (True, False):
        engine.admit(job(**ASKED, previews=previews))
        [made] = [outcome for outcome in run(engine) if isinstance(outcome, PictureMade)]
        drawn.append(made.data)
    assert drawn[0] == drawn[1]

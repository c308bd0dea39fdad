"""Jobs that start from a picture, through the real engine: what is known stays, and is seen only once."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from model.pipeline import Pipeline
from service.errors import InvalidRequest
from service.queue_records import Source
from service.schemas import SavingsReport
from service.worker.engine import Engine
from service.worker.outcomes import JobDone, PictureMade
from service.worker.previews import PreviewPace
from service.worker.scheduler import Scheduler
from service.worker.source_images import STRENGTH, prepare
from tests.service.gateway.pictures import decoded, encoded, gradient
from tests.service.worker.jobs import job

BOX = (0, 0, 16, 16)  # one corner: a quarter of a 32×32 picture
ADAPTIVE = {"name": "adaptive", "tolerance": 0.0, "skip_tolerance": 0.0}


@pytest.fixture
def engine(pipelines: dict[str, Pipeline]) -> Engine:
    return Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), 1 << 30)


def source(size: int = 32, box: tuple[int, int, int, int] | None = BOX) -> Source:
    changes = None
    if box is not None:
        picture = Image.new("L", (size, size), 0)
        picture.paste(255, box)
        changes = encoded(picture)
    return Source(encoded(gradient(size, size)), changes)


def drawn(engine: Engine, start: Source | None, **fields: object) -> tuple[Image.Image, SavingsReport]:
    engine.admit(job(sampler=ADAPTIVE, steps=4, **fields), start)
    outcomes = []
    while engine.jobs:
        outcomes += engine.step()
    [picture] = [each for each in outcomes if isinstance(each, PictureMade)]
    [done] = [each for each in outcomes if isinstance(each, JobDone)]
    return Image.open(BytesIO(picture.data)), done.report


def test_what_the_mask_keeps_is_kept_exactly_and_seen_only_once(engine: Engine) -> None:
    whole, dense = drawn(engine, None)
    picture, report = drawn(engine, source(), image="sha256:x", mask="sha256:x", width=32, height=32)
    kept = np.asarray(gradient(32, 32))
    made = np.asarray(picture)
    changed = np.zeros((32, 32), dtype=bool)
    changed[:16, :16] = True
    assert (made[~changed] == kept[~changed]).all()
    assert (made[changed] != kept[changed]).any()
    look, step = dense.patch_evaluations / 4, dense.patch_evaluations / 16
    assert report.patch_evaluations == look + 3 * step, "all patches once, as context, then the quarter that changes"
    assert whole.size == picture.size


def test_what_is_kept_is_kept_at_the_size_of_the_answer(engine: Engine) -> None:
    picture, _ = drawn(engine, source(100, (0, 0, 50, 50)), image="sha256:x", mask="sha256:x", width=100, height=100)
    assert picture.size == (100, 100)
    assert (np.asarray(picture)[50:] == np.asarray(gradient(100, 100))[50:]).all()


def test_a_weaker_change_stays_nearer_and_costs_less(engine: Engine, pipelines: dict[str, Pipeline]) -> None:
    start = source(box=None)
    clean = prepare(pipelines["tiny-class"], start, 1.0).clean
    original = pipelines["tiny-class"].decode(clean[None])[0].float()
    distances, costs = [], []
    for strength in (0.25, 1.0):
        picture, report = drawn(engine, start, image="sha256:x", strength=strength)
        made = torch.from_numpy(np.array(picture)).float()
        distances.append(float((made - original).abs().mean()))
        costs.append(report.patch_evaluations)
    assert distances[0] < distances[1]
    assert costs[0] < costs[1]


def test_where_patches_start(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-class"]
    times = prepare(pipeline, source(), 0.75).times.reshape(pipeline.grid.rows, pipeline.grid.columns)
    assert times[0, 0] == 0.25
    assert (times == 1).sum() == pipeline.grid.patches * 3 / 4
    one_pixel = prepare(pipeline, source(100, (99, 0, 100, 1)), None).times
    assert (one_pixel < 1).sum() == 1
    assert one_pixel[pipeline.grid.columns - 1] == 0, "a mask's default is to change all"
    assert torch.allclose(prepare(pipeline, source(box=None), None).times, torch.tensor(1 - STRENGTH))


def test_a_mask_that_keeps_everything_gives_the_picture_back_beside_others(engine: Engine) -> None:
    for others in (0, 1):
        beside = [job(steps=4) for _ in range(others)]
        for each in beside:
            engine.admit(each)
        kept = job(sampler=ADAPTIVE, steps=4, n=2, image="sha256:x", mask="sha256:x", width=32, height=32)
        engine.admit(kept, source(box=(0, 0, 0, 0)))
        outcomes = []
        for _ in range(4):
            outcomes += engine.step()
        assert not engine.jobs
        made = [each for each in outcomes if isinstance(each, PictureMade) and each.job_id == kept.id]
        assert [each.index for each in made] == [0, 1]
        for each in made:
            assert (np.asarray(Image.open(BytesIO(each.data))) == np.asarray(gradient(32, 32))).all()
        [done] = [each for each in outcomes if isinstance(each, JobDone) and each.job_id == kept.id]
        assert done.report.patch_evaluations == 0
        assert {each.job_id for each in outcomes if isinstance(each, JobDone)} == {kept.id, *(b.id for b in beside)}


def test_the_same_seed_gives_the_same_edit(engine: Engine) -> None:
    pictures = [drawn(engine, source(), image="sha256:x", mask="sha256:x")[0] for _ in range(2)]
    assert np.abs(np.asarray(pictures[0]).astype(int) - np.asarray(pictures[1]).astype(int)).max() <= 1


def test_a_sampler_that_moves_all_patches_alike_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.admit(job(sampler="euler", image="sha256:x"), source())
    assert caught.value.field == "sampler"
    assert not engine.jobs


def test_a_picture_without_a_source_is_resampled(engine: Engine) -> None:
    picture, _ = drawn(engine, None, width=96, height=64, output_format="webp")
    assert (picture.size, picture.format) == ((96, 64), "WEBP")


def test_tokens_of_the_prompt_are_reported(engine: Engine) -> None:
    for prompt, tokens in [("apple", 3), ("a " * 50, 8)]:
        _, report = drawn(engine, None, model="tiny-text", prompt=prompt)
        assert report.prompt_tokens == tokens, "with the two that frame it, as far as they are read"
        assert report.prompt_truncated is (tokens == 8)


def test_stored_pictures_are_read_back_as_they_were() -> None:
    assert decoded(source().image).tobytes() == gradient(32, 32).tobytes()

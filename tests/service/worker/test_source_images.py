"""Jobs that edit a picture, with the real engine: known patches stay, and are evaluated only once."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import Trajectory, run
from patchforge.service import memory
from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.fit import Fit
from patchforge.service.messages.schemas import STRENGTH, SavingsReport
from patchforge.service.messages.source import Source
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobDone, PictureMade
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from patchforge.service.worker.source_images import SourceImage, prepare_source
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


def test_what_is_kept_of_a_patch_arrives_at_the_picture_whatever_is_predicted(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-class"]
    image = prepare_source(pipeline, source(100, (99, 0, 100, 1)), None)
    sampler, condition = pipeline.sampler("adaptive", steps=3, guidance=2.0), pipeline.condition_on("cat")
    edit = Trajectory(sampler, condition, image.begin(sampler, pipeline.noise(0)))
    run(pipeline.denoiser, [edit])
    assert image.kept is not None
    partly = image.kept.any(dim=1) & ~image.kept.all(dim=1)
    assert partly.sum() == 1, "the patch with the one pixel that may change"
    missed = (edit.state.x - image.clean)[partly]
    kept = image.kept[partly]
    assert missed[kept].abs().max() < 1e-5
    assert missed[~kept].abs().max() > 1e-2


def test_colours_meet_where_the_mask_cuts() -> None:
    size = (256, 64)
    original, drawn_over = Image.new("RGB", size, (200, 100, 50)), Image.new("RGB", size, (160, 120, 50))
    changes = Image.new("L", size, 0)
    changes.paste(255, (128, 0, 256, 64))
    changes.paste(255, (20, 0, 22, 64))
    picture = SourceImage(torch.empty(0), torch.empty(0), None, original, changes, (0, 0, *size)).over(drawn_over)
    row = np.asarray(picture).astype(int)[32]
    assert (row[:20] == (200, 100, 50)).all(), "kept exactly"
    assert np.abs(row[128] - row[127]).max() <= 8, "no step at the cut, of 40 before"
    assert np.abs(np.diff(row[127:], axis=0)).max() <= 14, "it fades"
    assert (row[200:] == (160, 120, 50)).all(), "away from it, the picture as drawn"


def test_a_weaker_change_stays_nearer_and_costs_less(engine: Engine, pipelines: dict[str, Pipeline]) -> None:
    start = source(box=None)
    clean = prepare_source(pipelines["tiny-class"], start, 1.0).clean
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
    times = prepare_source(pipeline, source(), 0.75).times.reshape(pipeline.grid.rows, pipeline.grid.columns)
    assert times[0, 0] == 0.25
    assert (times == 1).sum() == pipeline.grid.patches * 3 / 4
    one_pixel = prepare_source(pipeline, source(100, (99, 0, 100, 1)), None).times
    assert (one_pixel < 1).sum() == 1
    assert one_pixel[pipeline.grid.columns - 1] == 0, "a mask's default is to change all"
    assert torch.allclose(prepare_source(pipeline, source(box=None), None).times, torch.tensor(1 - STRENGTH))


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


def wide(changes: tuple[int, int, int, int] | None = None) -> Source:
    """A picture twice as wide as high."""
    marks = None
    if changes is not None:
        picture = Image.new("L", (64, 32), 0)
        picture.paste(255, changes)
        marks = encoded(picture)
    return Source(encoded(gradient(64, 32)), marks)


def test_a_picture_of_another_shape_is_seen_in_its_own(engine: Engine, pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-class"]
    rows, columns = pipeline.grid.rows, pipeline.grid.columns
    seen = prepare_source(pipeline, wide(), None, Fit.CONTAIN)
    assert seen.region == (0, 8, 32, 24)
    times = seen.times.reshape(rows, columns)
    assert (times[: rows // 4] == 1).all(), "bars are known"
    assert torch.allclose(times[rows // 4 : -rows // 4], torch.tensor(1 - STRENGTH))
    squeezed = prepare_source(pipeline, wide(), None, Fit.STRETCH)
    assert squeezed.region == (0, 0, 32, 32)
    assert torch.allclose(squeezed.times, torch.tensor(1 - STRENGTH))
    corner = prepare_source(pipeline, wide((0, 0, 1, 1)), None, Fit.CONTAIN).times.reshape(rows, columns)
    assert (corner < 1).nonzero().tolist() == [[rows // 4, 0]], "a single pixel marks its patch"


def test_an_edit_of_another_shape_has_no_bars_and_keeps_what_it_keeps(engine: Engine) -> None:
    fields = {"image": "sha256:x", "width": 64, "height": 32, "fit": "contain"}
    picture, _ = drawn(engine, wide((0, 0, 32, 32)), mask="sha256:x", **fields)
    made, sent = np.asarray(picture), np.asarray(gradient(64, 32))
    assert made.shape == sent.shape
    assert (made[:, 32:] == sent[:, 32:]).all()
    assert (made[:, :32] != sent[:, :32]).any()


def test_an_edit_is_drawn_in_the_nearest_size_of_the_model(engine: Engine) -> None:
    fields = {"image": "sha256:x", "mask": "sha256:x", "model": "tiny-text"}
    picture, report = drawn(engine, wide((0, 0, 16, 32)), width=64, height=32, **fields)
    made, sent = np.asarray(picture), np.asarray(gradient(64, 32))
    assert (report.grid_rows, report.grid_columns) == (2, 4)
    assert (made[:, 16:] == sent[:, 16:]).all()
    assert (made[:, :16] != sent[:, :16]).any()
    assert report.images[0].finished_at.count(1) == 6, "known patches end with the one look at them"


def test_a_drawing_comes_to_another_shape_as_asked(engine: Engine) -> None:
    plain = np.asarray(drawn(engine, None)[0]).astype(int)
    shapes = {"contain": None, "cover": None, "stretch": None, None: None}
    made = {fit: np.asarray(drawn(engine, None, width=64, height=32, fit=fit)[0]).astype(int) for fit in shapes}
    assert {each.shape for each in made.values()} == {(32, 64, 3)}
    assert (made["contain"][:, :16] == 255).all()
    assert (made["contain"][:, 48:] == 255).all()
    assert np.abs(made["contain"][:, 16:48] - plain).max() <= 1
    middle = Image.fromarray(plain.astype(np.uint8)).resize((64, 32), Image.Resampling.LANCZOS, box=(0, 8, 32, 24))
    assert np.abs(made["cover"] - np.asarray(middle).astype(int)).max() <= 8
    assert np.array_equal(made["stretch"], made[None]), "a gateway that says nothing means to stretch"


def test_tokens_of_the_prompt_are_reported(engine: Engine) -> None:
    for prompt, tokens in [("apple", 3), ("a " * 50, 8)]:
        _, report = drawn(engine, None, model="tiny-text", prompt=prompt)
        assert report.prompt_tokens == tokens, "with the two that frame it, as far as they are read"
        assert report.prompt_truncated is (tokens == 8)


def test_stored_pictures_are_read_back_as_they_were() -> None:
    assert decoded(source().image).tobytes() == gradient(32, 32).tobytes()


def test_a_source_that_would_take_more_memory_than_there_is_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000.0)
    with pytest.raises(MemoryError, match="pixels take"):
        engine.admit(job(image="sha256:x", sampler=ADAPTIVE), source())

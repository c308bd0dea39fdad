"""The engine: packing, isolation, previews and reports, with real (tiny) networks."""

from __future__ import annotations

import math
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from patchforge.model.pipeline import Pipeline
from patchforge.model.preview import PreviewDecoder
from patchforge.model.samplers.adaptive import Adaptive, AdaptiveState
from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.schemas import OutputFormat
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobBroken, JobDone, Outcome, PatchesMade, PictureMade, PreviewMade
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from tests.rounding import assert_same
from tests.service.worker.jobs import job

DUAL_LOOP = {"name": "dual_loop", "quantile": 0.4, "inner_steps": 4}


@pytest.fixture
def engine(pipelines: dict[str, Pipeline]) -> Engine:
    return Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), 1 << 30)


def run(engine: Engine) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while engine.jobs:
        outcomes += engine.step()
    return outcomes


def pixels(outcomes: list[Outcome], job_id: str, index: int = 0) -> np.ndarray:
    [made] = [o for o in outcomes if isinstance(o, PictureMade) and (o.job_id, o.index) == (job_id, index)]
    return np.asarray(Image.open(BytesIO(made.data))).astype(int)


def test_a_picture_packed_with_others_is_the_picture_made_alone(engine: Engine) -> None:
    mix = [
        job(n=2),
        job(sampler=DUAL_LOOP, class_label="dog", steps=2),
        job(sampler="look_ahead", guidance=1.0, steps=5),
        job(model="tiny-text", sampler=DUAL_LOOP),
        job(model="tiny-text", prompt="a blue car", seed=3, steps=4),
    ]
    for each in mix:
        engine.admit(each)
    together = run(engine)
    for each in mix:
        engine.admit(each)
        alone = run(engine)
        for index in range(each.request.n):
            difference = np.abs(pixels(together, each.id, index) - pixels(alone, each.id, index))
            assert difference.max() <= 1


def test_pictures_of_several_sizes_share_a_step_and_are_those_made_alone(engine: Engine) -> None:
    """The text bundle draws 32×32, 16×16 and 32×16 itself; other sizes come from the one that is nearest."""
    sizes = {(16, 16): (2, 2), (32, 16): (2, 4), (32, 32): (4, 4), (8 * 16, 4 * 16): (2, 4), (20, 20): (4, 4)}
    adaptive = {"name": "adaptive", "tolerance": 0.05}
    fields = [{"width": width, "height": height} for width, height in sizes] + [{}]
    samplers = ("euler", DUAL_LOOP, adaptive, adaptive, "heun", adaptive)
    mix = [
        job(model="tiny-text", seed=seed, sampler=sampler, steps=4, **size)
        for seed, (size, sampler) in enumerate(zip(fields, samplers, strict=True))
    ]
    for each in mix:
        engine.admit(each)
    together = engine.step()
    assert set(engine.last_shares) == {each.id for each in mix}, "all in one evaluation"
    together += run(engine)
    for each, grid in zip(mix, [*sizes.values(), (4, 4)], strict=True):
        engine.admit(each)
        alone = run(engine)
        made = pixels(together, each.id)
        assert made.shape == (each.request.height or 32, each.request.width or 32, 3)
        assert np.abs(made - pixels(alone, each.id)).max() <= 1
        [report] = [o.report for o in alone if isinstance(o, JobDone)]
        assert (report.grid_rows, report.grid_columns, report.patches) == (*grid, math.prod(grid))
        assert len(report.images[0].finished_at) == len(report.images[0].difficulty) == math.prod(grid)
        told = None if grid == (4, 4) else list(grid)
        previews = [o.preview for o in together if isinstance(o, PreviewMade) and o.job_id == each.id]
        finished = [o.finished for o in together if isinstance(o, PatchesMade) and o.job_id == each.id]
        assert {len(preview.times) for preview in previews} == {math.prod(grid)}
        assert all(event.grid == told for event in [*previews, *finished])
        shown = Image.open(BytesIO(b64decode(previews[0].b64_png)))
        assert shown.size == (8 * grid[1], 8 * grid[0]), "in the size in which it is drawn"


def test_pictures_of_a_request_count_their_seeds_up(engine: Engine) -> None:
    several, second = job(n=2, seed=7), job(seed=8)
    engine.admit(several)
    engine.admit(second)
    outcomes = run(engine)
    assert np.array_equal(pixels(outcomes, several.id, 1), pixels(outcomes, second.id))
    assert not np.array_equal(pixels(outcomes, several.id, 0), pixels(outcomes, several.id, 1))


def test_the_report_counts_branches_and_what_was_saved(engine: Engine) -> None:
    dense, adaptive = job(steps=4, n=2), job(sampler=DUAL_LOOP, steps=4)
    for each in (dense, adaptive):
        engine.admit(each)
    reports = {o.job_id: o.report for o in run(engine) if isinstance(o, JobDone)}
    full = reports[dense.id]
    assert full.patch_evaluations == full.dense_patch_evaluations == 2 * 2 * 4 * 16  # pictures, branches, steps, P
    assert full.savings_ratio == 0
    assert full.queue_seconds == 2.5
    assert full.images[0].finished_at == [4] * 16
    saved = reports[adaptive.id]
    assert saved.dense_patch_evaluations == 2 * 16 * 16
    # Each step has two evaluations of all 16 patches and two of the hard ones. Six are easy, below the seventh.
    assert saved.patch_evaluations == 4 * 2 * (2 * 16 + 2 * 10)
    assert saved.savings_ratio == pytest.approx(0.1875)
    assert sorted(set(saved.images[0].finished_at)) == [13, 16]  # easy ones end with the last step's first evaluation


def test_previews_are_estimates_of_the_clean_picture(engine: Engine) -> None:
    engine.admit(job(sampler=DUAL_LOOP, steps=3))
    previews = [o.preview for o in run(engine) if isinstance(o, PreviewMade)]
    assert len(previews) == 11  # of 12 evaluations, the last one gives the picture itself
    assert [p.evaluation for p in previews] == list(range(1, 12))
    assert previews[-1].finished_share == pytest.approx(6 / 16)
    assert previews[0].patch_evaluations == previews[0].dense_patch_evaluations == 32
    first = Image.open(BytesIO(b64decode(previews[0].b64_png)))
    assert first.size == (32, 32)


def test_partial_images_are_made_however_little_time_previews_may_take(pipelines: dict[str, Pipeline]) -> None:
    busy = PreviewPace(interval=1e9, share=0.0)
    busy.showed(1, 1.0)  # more than was saved up
    engine = Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), busy, 1 << 30)
    asked, other = job(steps=8, n=2, partial_images=3), job(steps=8)
    engine.admit(asked)
    engine.admit(other)
    previews = [(o.job_id, o.preview.index, o.preview.evaluation) for o in run(engine) if isinstance(o, PreviewMade)]
    assert sorted(previews) == [(asked.id, index, evaluation) for index in (0, 1) for evaluation in (2, 4, 6)]


def test_a_preview_is_the_decoded_estimate_not_the_noisy_state(engine: Engine, pipelines: dict[str, Pipeline]) -> None:
    live = engine.admit(job(steps=6))
    for _ in range(3):
        [made] = [outcome for outcome in engine.step() if isinstance(outcome, PreviewMade)]
        state = live.pictures[0].trajectory.state
        shown = np.asarray(Image.open(BytesIO(b64decode(made.preview.b64_png)))).astype(int)
        decode = pipelines["tiny-class"].decode
        estimate, noisy = (decode(each[None])[0].numpy().astype(int) for each in (state.estimate, state.x))
        assert np.array_equal(shown, estimate)
        assert not np.array_equal(shown, noisy)


def test_a_preview_decoder_makes_the_previews_and_no_finished_picture(
    engine: Engine, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.admit(job(steps=3, seed=5))
    plain = [o.data for o in run(engine) if isinstance(o, PictureMade)]
    pipeline = pipelines["tiny-class"]
    torch.manual_seed(0)
    monkeypatch.setattr(pipeline.codec, "previewer", PreviewDecoder(pipeline.manifest.latent.channels).eval())
    decoded: list[int] = []
    decode = pipeline.codec.decode
    monkeypatch.setattr(pipeline.codec, "decode", lambda latents: decoded.append(len(latents)) or decode(latents))
    live = engine.admit(job(steps=3, seed=5))
    outcomes = engine.step()
    [made] = [outcome for outcome in outcomes if isinstance(outcome, PreviewMade)]
    latents = pipeline.grid.unpatchify(live.pictures[0].trajectory.state.estimate[None])
    small = pipeline.codec.preview(latents)
    assert small is not None
    assert np.array_equal(np.asarray(Image.open(BytesIO(b64decode(made.preview.b64_png)))), small[0].numpy())
    assert not decoded
    assert [o.data for o in run(engine) if isinstance(o, PictureMade)] == plain
    assert decoded == [1]


def test_a_negative_prompt_is_the_text_of_the_null_branch(engine: Engine) -> None:
    asked = {None: {}, "empty": {"negative_prompt": ""}, "dog": {"negative_prompt": "dog"}}
    asked["unguided"] = {"negative_prompt": "dog", "guidance": 1.0}
    asked["plain"] = {"guidance": 1.0}
    jobs = {name: job(model="tiny-text", deterministic=True, **fields) for name, fields in asked.items()}
    for each in jobs.values():
        engine.admit(each)
    outcomes = run(engine)
    made = {name: pixels(outcomes, each.id) for name, each in jobs.items()}
    assert np.array_equal(made["empty"], made[None]), "to the bit"
    assert not np.array_equal(made["dog"], made[None])
    assert np.array_equal(made["unguided"], made["plain"]), "without guidance there is no null branch"


def test_a_negative_prompt_that_is_cut_is_told(engine: Engine) -> None:
    for text, told in (("dog", None), ("dog " * 50, True)):
        engine.admit(job(model="tiny-text", negative_prompt=text))
        [report] = [o.report for o in run(engine) if isinstance(o, JobDone)]
        assert report.model_dump().get("negative_prompt_truncated") is told
        assert not report.prompt_truncated
    asked = job()
    asked = asked.model_copy(update={"request": asked.request.model_copy(update={"negative_prompt": "dog"})})
    with pytest.raises(InvalidRequest) as caught:
        engine.admit(asked)
    assert caught.value.field == "negative_prompt"


def test_no_previews_unless_wanted(engine: Engine) -> None:
    engine.admit(job(previews=False))
    outcomes = run(engine)
    assert [type(o) for o in outcomes] == [PatchesMade, PictureMade, JobDone]
    assert outcomes[-1].report.time_to_first_preview_seconds is None


@pytest.mark.parametrize("output_format", list(OutputFormat))
def test_formats(engine: Engine, output_format: OutputFormat) -> None:
    engine.admit(job(output_format=output_format, output_compression=50))
    [made] = [o for o in run(engine) if isinstance(o, PictureMade)]
    assert Image.open(BytesIO(made.data)).format == output_format.value.upper()


def test_a_prompt_longer_than_the_encoder_reads_is_reported(engine: Engine) -> None:
    engine.admit(job(model="tiny-text", prompt="a very long prompt " * 20))
    [done] = [o for o in run(engine) if isinstance(o, JobDone)]
    assert done.report.prompt_truncated


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": "absent"}, "model"),
        ({"class_label": "unicorn"}, "class_label"),
        ({"model": "tiny-text", "prompt": None, "class_label": "cat"}, "prompt"),
        ({"class_label": None, "prompt": "cat"}, "class_label"),
        ({"steps": None}, "model"),
    ],
)
def test_a_job_that_does_not_fit_is_refused(engine: Engine, fields: dict, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.admit(job(**fields))
    assert caught.value.field == field
    assert not engine.jobs


def poison(engine: Engine, job_id: str, value: float) -> None:
    live = engine.jobs[job_id]
    state = live.pictures[0].trajectory.state
    state.x.fill_(value)


def test_a_request_that_goes_nan_fails_alone(engine: Engine) -> None:
    good, bad = job(), job()
    for each in (good, bad):
        engine.admit(each)
    poison(engine, bad.id, float("nan"))
    outcomes = run(engine)
    [broken] = [o for o in outcomes if isinstance(o, JobBroken)]
    assert (broken.job_id, broken.error.code) == (bad.id, "not_finite")
    engine.admit(again := job())
    assert np.array_equal(pixels(outcomes, good.id), pixels(run(engine), again.id))


def test_a_request_whose_evaluation_raises_fails_alone(
    engine: Engine, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = job(), job(sampler="look_ahead", steps=2)
    engine.admit(good)
    live = engine.admit(bad)
    culprit = live.pictures[0].trajectory
    denoiser = pipelines["tiny-class"].denoiser
    evaluate = denoiser.evaluate

    def out_of_memory_for_the_culprit(evaluations):
        if any(each.memory is culprit.memory for each in evaluations):
            raise torch.OutOfMemoryError("too many patches")
        return evaluate(evaluations)

    monkeypatch.setattr(denoiser, "evaluate", out_of_memory_for_the_culprit)
    outcomes = run(engine)
    [broken] = [o for o in outcomes if isinstance(o, JobBroken)]
    assert (broken.job_id, broken.error.code) == (bad.id, "out_of_memory")
    assert [o.job_id for o in outcomes if isinstance(o, JobDone)] == [good.id]


def test_pictures_too_many_to_decode_at_once_are_decoded_in_portions(
    engine: Engine, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines["tiny-class"]
    decode = pipeline.decode

    def out_of_memory_for_more_than_two(patches, grid):
        if len(patches) > 2:
            raise torch.OutOfMemoryError("too many pictures")
        return decode(patches, grid)

    engine.admit(several := job(n=5))
    whole = run(engine)
    monkeypatch.setattr(pipeline, "decode", out_of_memory_for_more_than_two)
    engine.admit(again := job(n=5))
    portions = run(engine)
    assert [o.job_id for o in portions if isinstance(o, JobDone)] == [again.id]
    for index in range(5):
        assert np.abs(pixels(whole, several.id, index) - pixels(portions, again.id, index)).max() <= 1


def test_a_picture_that_cannot_be_decoded_fails_alone(
    engine: Engine, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines["tiny-class"]
    decode = pipeline.decode
    good, bad = job(previews=False), job(previews=False, seed=666)
    engine.admit(good)
    culprit = engine.admit(bad).pictures[0]

    def broken_for_the_culprit(patches, grid):
        if any(torch.equal(each, culprit.trajectory.state.x) for each in patches):
            raise RuntimeError("no such picture")
        return decode(patches, grid)

    monkeypatch.setattr(pipeline, "decode", broken_for_the_culprit)
    outcomes = run(engine)
    [broken] = [o for o in outcomes if isinstance(o, JobBroken)]
    assert (broken.job_id, broken.error.code) == (bad.id, "evaluation_failed")
    assert [o.job_id for o in outcomes if isinstance(o, JobDone)] == [good.id]


class Undecided(Adaptive):
    """A sampler that fails with the answers to its question."""

    def answer(self, state: AdaptiveState, answer: torch.Tensor) -> AdaptiveState:
        raise RuntimeError("no idea")


def test_a_picture_that_cannot_be_planned_fails_alone(engine: Engine) -> None:
    culprit, *others = [engine.admit(job(sampler="adaptive", seed=seed)) for seed in range(4)]
    trajectory = culprit.pictures[0].trajectory
    trajectory.sampler = Undecided(trajectory.sampler.grid, 3, 2.0)
    outcomes = run(engine)
    assert [o.job_id for o in outcomes if isinstance(o, JobBroken)] == [culprit.job.id]
    assert {o.job_id for o in outcomes if isinstance(o, JobDone)} == {each.job.id for each in others}


def test_a_dropped_job_is_not_evaluated_again(engine: Engine) -> None:
    dropped, kept = job(steps=50), job()
    for each in (dropped, kept):
        engine.admit(each)
    engine.step()
    engine.drop(dropped.id)
    assert {o.job_id for o in run(engine)} == {kept.id}


def test_finished_patches_are_told_when_and_from_where(engine: Engine) -> None:
    engine.admit(each := job(sampler=DUAL_LOOP, steps=3, previews=False))
    outcomes = run(engine)
    told = [o.finished for o in outcomes if isinstance(o, PatchesMade)]
    [report] = [o.report.images[0] for o in outcomes if isinstance(o, JobDone)]
    # Easy patches finish the last step with its first evaluation, hard ones at its end.
    assert [event.evaluation for event in told] == [9, 12]
    assert sorted(patch for event in told for patch in event.patches) == list(range(16))
    assert all(report.finished_at[patch] == event.evaluation for event in told for patch in event.patches)
    assert set(told[0].times) == {round(2 / 3, 4)}
    assert set(told[1].times) == {round(11 / 12, 4)}
    assert told[0].finished_share == pytest.approx(6 / 16)
    assert told[1].finished_share == 1
    kinds = [type(o) for o in outcomes if o.job_id == each.id]
    assert kinds.index(PictureMade) > max(i for i, kind in enumerate(kinds) if kind is PatchesMade)


def latents(engine: Engine, **fields: object) -> list[torch.Tensor]:
    live = engine.admit(job(**fields))
    run(engine)
    return [picture.trajectory.state.x for picture in live.pictures]


@pytest.mark.parametrize("fields", [{}, {"sampler": DUAL_LOOP}, {"model": "tiny-text", "sampler": "look_ahead"}])
def test_a_deterministic_request_is_bit_equal_whatever_runs_beside_it(engine: Engine, fields: dict) -> None:
    alone = latents(engine, deterministic=True, n=2, **fields)
    company = [job(steps=5, guidance=1.0), job(model="tiny-text", n=3), job(sampler=DUAL_LOOP)]
    for each in company:
        engine.admit(each)
    beside = latents(engine, deterministic=True, n=2, **fields)
    assert all(map(torch.equal, alone, beside))
    packed = latents(engine, n=2, **fields)
    for one, other in zip(alone, packed, strict=True):
        assert_same(one, other)


def test_a_deterministic_request_shares_no_evaluation(
    engine: Engine, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, packs = pipelines["tiny-class"].denoiser.evaluate, []

    def watched(evaluations):
        packs.append([id(each.memory) for each in evaluations])
        return evaluate(evaluations)

    monkeypatch.setattr(pipelines["tiny-class"].denoiser, "evaluate", watched)
    live = engine.admit(job(deterministic=True, n=2))
    own = {id(picture.trajectory.memory) for picture in live.pictures}
    engine.admit(job(n=2))
    run(engine)
    assert any(len(pack) > 1 for pack in packs)
    assert all(len(pack) == 1 for pack in packs if own & set(pack))


def test_kept_keys_and_values_are_bounded_and_everyone_finishes(pipelines: dict[str, Pipeline]) -> None:
    slot = pipelines["tiny-class"].denoiser.pool.slot_bytes(16)
    budgets = dict.fromkeys(pipelines, 4096)
    engine = Engine(pipelines, Scheduler(budgets), PreviewPace(0.0, math.inf), cache_bytes=5 * slot)
    mix = [job(sampler=DUAL_LOOP, n=2), job(sampler=DUAL_LOOP, steps=2), job(steps=2)]
    for each in mix:
        engine.admit(each)
    outcomes: list[Outcome] = []
    most = 0
    while engine.jobs:
        outcomes += engine.step()
        most = max(most, engine.caches.used)
    assert most == 4 * slot  # two pictures of two branches each; the third waited
    assert {o.job_id for o in outcomes if isinstance(o, JobDone)} == {each.id for each in mix}
    assert engine.caches.used == 0
    engine.admit(dropped := job(sampler=DUAL_LOOP))
    for _ in range(3):
        engine.step()
    assert engine.caches.used == 2 * slot
    engine.drop(dropped.id)
    assert engine.caches.used == 0


def test_small_pictures_take_room_for_their_own_patches_only(pipelines: dict[str, Pipeline]) -> None:
    pool = pipelines["tiny-text"].denoiser.pool
    small, large = {"width": 16, "height": 16}, {"width": 32, "height": 32}
    room = 2 * (pool.slot_bytes(16) + 4 * pool.slot_bytes(4))  # two branches each
    assert room == 4 * pool.slot_bytes(16)
    engine = Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), cache_bytes=room)
    for size in (large, *4 * [small]):
        engine.admit(job(model="tiny-text", sampler=DUAL_LOOP, **size))
    engine.admit(waiting := job(model="tiny-text", sampler=DUAL_LOOP, **small))
    most = kept = 0
    while waiting.id in engine.jobs and len(engine.jobs) > 1:
        engine.step()
        most = max(most, engine.caches.used)
        kept = max(kept, pool.slot_bytes(1) * pool.rows_in_use // 2)
    assert most == kept == room, "what is granted is what is kept"
    run(engine)
    assert engine.caches.used == 0


def test_a_picture_waiting_for_room_is_not_overtaken_by_smaller_ones(pipelines: dict[str, Pipeline]) -> None:
    slot = pipelines["tiny-class"].denoiser.pool.slot_bytes(16)
    engine = Engine(
        pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), cache_bytes=3 * slot
    )
    for each in (job(sampler=DUAL_LOOP), waiting := job(sampler=DUAL_LOOP), job(sampler=DUAL_LOOP, guidance=1.0)):
        engine.admit(each)
    while not engine.caches.used:
        engine.step()
    assert engine.caches.used == 2 * slot, "one slot is free, and kept for the picture of two branches"
    while waiting.id in engine.jobs:
        engine.admit(job(sampler=DUAL_LOOP, guidance=1.0))
        engine.step()
        assert len(engine.jobs) < 100, "it waits for ever"
    engine.jobs.clear()

"""Finished pictures in each format: what their files say of how they were made."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image

from patchforge.model.pipeline import Pipeline
from patchforge.service.messages.room import preview_limit
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import PictureMade
from patchforge.service.worker.pictures import encode_picture, encode_preview
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from tests.service.worker.jobs import job, request
from tests.written_settings import written_settings


def drawn(pipelines: dict[str, Pipeline], **fields: Any) -> list[bytes]:
    engine = Engine(pipelines, Scheduler(dict.fromkeys(pipelines, 4096)), PreviewPace(0.0, math.inf), 1 << 30)
    engine.admit(job(**fields))
    made = []
    while engine.jobs:
        made += [each for each in engine.step() if isinstance(each, PictureMade)]
    return [each.data for each in sorted(made, key=lambda each: each.index)]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_every_picture_of_a_job_tells_its_own_seed_and_all_settings(
    output_format: str, pipelines: dict[str, Pipeline]
) -> None:
    fields = {"n": 2, "seed": 7, "sampler": {"name": "dual_loop", "quantile": 0.4}, "steps": 2, "guidance": 2.5}
    told = [written_settings(data) for data in drawn(pipelines, **fields, output_format=output_format)]
    assert [details["seed"] for _, details in told] == [7, 8]
    text, details = told[1]
    assert text.startswith("cat\nSteps: 2, Sampler: dual_loop, CFG scale: 2.5, Seed: 8, Size: 32x32, Model hash: ")
    assert details["weights_sha256"] == pipelines["tiny-class"].weights_sha256
    assert details["model_digest"] == pipelines["tiny-class"].digest != details["weights_sha256"]
    assert (details["model"], details["class_label"], details["steps"]) == ("tiny-class", "cat", 2)
    assert details["sampler"] == {"name": "dual_loop", "quantile": 0.4, "inner_steps": 4, "exact": False}


def test_the_size_is_that_of_the_file(pipelines: dict[str, Pipeline]) -> None:
    [data] = drawn(pipelines, width=48, height=64)
    text, details = written_settings(data)
    assert ", Size: 48x64, " in text
    assert (details["width"], details["height"]) == (48, 64) == Image.open(BytesIO(data)).size


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_metadata_changes_no_pixel_and_can_be_left_out(output_format: str) -> None:
    pixels = torch.arange(8 * 8 * 3, dtype=torch.uint8).reshape(8, 8, 3)
    settings = {**request().model_dump(), "weights_sha256": "0" * 64}
    with_it, without = (
        encode_picture(pixels, request(output_format=output_format, metadata=on), settings) for on in (True, False)
    )
    assert written_settings(with_it)[1]["class_label"] == "cat"
    bare = Image.open(BytesIO(without))
    assert not {"parameters", "patchforge", "exif"} & bare.info.keys()
    assert Image.open(BytesIO(with_it)).tobytes() == bare.tobytes()


def test_previews_of_large_pictures_are_smaller() -> None:
    noise = torch.randint(256, (600, 900, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for pictures in (1, 10):
        made = encode_preview(noise, preview_limit(pictures))
        assert 0.6 * preview_limit(pictures) < len(made) <= preview_limit(pictures)
        with Image.open(BytesIO(made)) as shown:
            assert shown.width / shown.height == pytest.approx(1.5, rel=0.05)
    assert Image.open(BytesIO(encode_preview(noise[:64, :64], preview_limit(10)))).size == (64, 64), "it fits"
    white = torch.full((400, 400, 3), 255, dtype=torch.uint8)
    assert Image.open(BytesIO(encode_preview(white, preview_limit(1)))).size == (400, 400), "and so does this"

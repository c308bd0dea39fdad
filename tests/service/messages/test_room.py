"""What a job may come to hold is never less than what it does: see also tests/service/queue/test_queue_memory.py."""

from __future__ import annotations

import os
from io import BytesIO

import pytest
from PIL import Image

from patchforge.service.messages.room import PREVIEWS_BYTES, preview_limit, room_for
from patchforge.service.messages.samplers import DualLoop, Euler
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, OutputFormat
from patchforge.service.messages.source import Source

CARD = ModelCard(
    name="m",
    kind="text",
    width=64,
    height=64,
    grid=(8, 8),
    sampler=Euler(),
    steps=8,
    guidance=1.0,
    licence="none",
    created=0,
)


def room(source: Source | None = None, **fields: object) -> int:
    request = GenerationRequest(model="m", prompt="a cat", sampler=Euler(), steps=8, guidance=1.0, seed=1)
    return room_for(request.model_copy(update=fields), CARD, source)


@pytest.mark.parametrize("quality", [0, 50, 90, 95, 96, 100])
@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("size", [(16, 16), (200, 100), (512, 512)])
def test_noise_of_every_format_fits(output_format: OutputFormat, quality: int, size: tuple[int, int]) -> None:
    free = {"output_format": output_format, "output_compression": quality, "previews": False}
    left = room(**free, width=size[0], height=size[1])
    for noise in (
        os.urandom(3 * size[0] * size[1]),
        bytes(255 * (byte & 1) for byte in os.urandom(3 * size[0] * size[1])),
    ):
        buffer = BytesIO()
        options = {} if output_format is OutputFormat.PNG else {"quality": quality}
        Image.frombytes("RGB", size, noise).save(buffer, output_format.value, **options)
        assert len(buffer.getvalue()) < left


def test_it_grows_with_all_that_is_kept() -> None:
    least = room(previews=False)
    assert room(previews=False, n=2) > least + 3 * 64 * 64
    assert room() > least
    assert room(previews=False, width=128, height=128) > least + 3 * (128 * 128 - 64 * 64)
    assert room(Source(b"x" * 5000, b"y" * 3000), previews=False) == least + 8000
    request = GenerationRequest(model="m", prompt="a cat", sampler=Euler(), steps=8, seed=1, previews=False)
    assert room_for(request, CARD, pictures_elsewhere=True) < room(previews=False) - 3 * 64 * 64 + 1024
    edit = room_for(request, CARD, Source(b"x" * 50_000, b"y" * 30_000), pictures_elsewhere=True)
    assert edit == room_for(request, CARD, pictures_elsewhere=True) + 2048
    assert room(previews=False, prompt="x" * 1000) >= least + 1000 * 2
    assert room(previews=False, sampler=DualLoop(inner_steps=4)) > least
    assert room(n=10, steps=200) < room(n=10, steps=200, previews=False) + PREVIEWS_BYTES + 4096 * 2010


def test_the_newest_previews_of_each_picture_fit_together() -> None:
    for pictures in range(1, 11):
        event = preview_limit(pictures) * 4 // 3 + 8 * 256 + 400
        assert 4 * pictures * event <= PREVIEWS_BYTES

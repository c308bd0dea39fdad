"""Maps of a finished picture: what they show, and what is refused."""

from __future__ import annotations

from io import BytesIO

import httpx
import pytest
from PIL import Image

from patchforge.service.gateway.maps import colour, difficulty_levels, draw_map, finish_levels
from patchforge.service.messages.schemas import ImageReport
from tests.service.gateway.harness import COLUMNS, ROWS, ScriptedWorker

IMAGE = ImageReport(
    seed=1,
    patch_evaluations=4,
    dense_patch_evaluations=8,
    difficulty=[0.01, 0.1, 1.0, 0.01, 0.0, 1.0],
    finished_at=[2, 4, 8, 8, 2, 0],
)


def test_finish_runs_from_the_first_evaluation_to_the_last() -> None:
    assert finish_levels(IMAGE) == [0.25, 0.5, 1, 1, 0.25, 0]


def test_difficulty_runs_from_the_easiest_patch_to_the_hardest() -> None:
    levels = difficulty_levels(IMAGE)
    assert levels[4] == 0
    assert levels[2] == levels[5] == 1
    assert levels[0] == levels[3] < levels[1]
    assert difficulty_levels(IMAGE.model_copy(update={"difficulty": [0.5] * 6})) == [0] * 6


def test_a_map_has_a_square_of_its_colour_for_each_patch() -> None:
    with Image.open(BytesIO(draw_map([0, 0.5, 1, 1, 0.25, 0], columns=3))) as picture:
        assert picture.size == (255, 170)
        shown = picture.convert("RGB")
    assert shown.getpixel((10, 10)) == tuple(colour(0))
    assert shown.getpixel((250, 80)) == shown.getpixel((10, 90)) == tuple(colour(1))
    assert sum(colour(1)) > sum(colour(0.5)) > sum(colour(0))


async def finished(http: httpx.AsyncClient, **fields: object) -> str:
    job = (await http.post("/v1/jobs", json={"model": "tiny-text", "prompt": "x", **fields})).json()
    async with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        async for _ in events.aiter_lines():
            pass  # the stream ends with the job
    return job["id"]


@pytest.mark.parametrize("kind", ["finish", "difficulty"])
async def test_a_map_of_each_picture(http: httpx.AsyncClient, worker: ScriptedWorker, kind: str) -> None:
    job = await finished(http, n=2)
    answer = await http.get(f"/v1/jobs/{job}/maps/{kind}.png", params={"index": 1})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    with Image.open(BytesIO(answer.content)) as picture:
        assert picture.width * ROWS == picture.height * COLUMNS


async def test_what_there_is_no_map_of(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    job = await finished(http)
    worker.curtain.clear()
    running = (await http.post("/v1/jobs", json={"model": "tiny-text", "prompt": "x"})).json()["id"]
    refused = {
        f"{job}/maps/finish.png?index=1": 404,
        f"{job}/maps/finish.png?index=-1": 422,
        f"{job}/maps/beauty.png": 422,
        f"{job}/maps/finish": 404,
        f"{'0' * 26}/maps/finish.png": 404,
        f"{running}/maps/finish.png": 409,
    }
    for path, status in refused.items():
        answer = await http.get(f"/v1/jobs/{path}")
        assert answer.status_code == status, path
        assert answer.headers["content-type"] == "application/problem+json"
    worker.curtain.set()

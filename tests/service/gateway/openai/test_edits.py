"""Edits, requested with OpenAI's own client."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from patchforge.service.messages.samplers import Adaptive
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from tests.patience import PATIENCE
from tests.service.gateway.harness import PATCHES, ScriptedWorker, png
from tests.service.gateway.pictures import base64, decoded, encoded, gradient, mask

PICTURE = encoded(gradient())
MASK = encoded(mask())


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as made:
        yield made


def job_of(reply: Any) -> str:
    job_id: str = reply.model_extra["patchforge"]["job_id"]
    return job_id


async def test_an_edit_as_the_official_client_sends_it(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    extra = {"seed": 7, "strength": 0.8, "guidance": 2, "steps": 6, "priority": "low"}
    reply = await client.images.edit(
        image=("photo.png", PICTURE),
        mask=("mask.png", MASK),
        prompt="a red apple",
        model="tiny-text",
        n=2,
        size="96x64",
        quality="high",
        output_format="webp",
        output_compression=50,
        user="someone",
        extra_body=extra,
    )
    assert [b64decode(image.b64_json or "") for image in reply.data or []] == [png(7), png(8)]
    assert (reply.size, reply.quality, reply.safety_identifier) == ("96x64", "high", "someone")
    assert reply.usage is not None
    assert reply.usage.input_tokens_details.image_tokens == PATCHES
    request = (await worker.queue.get(job_of(reply))).request
    assert isinstance(request.sampler, Adaptive)
    assert (request.seed, request.strength, request.guidance, request.steps) == (7, 0.8, 2, 6)
    assert (request.width, request.height, request.output_compression, request.priority) == (96, 64, 50, "low")
    assert request.image == f"sha256:{sha256(PICTURE).hexdigest()}", "the record does not hold the picture"
    source = await worker.queue.source(job_of(reply))
    assert decoded(source.image).size == decoded(source.mask or b"").size == (96, 64)


async def test_without_a_size_or_a_mask(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    picture = encoded(gradient(200, 100), "jpeg")
    reply = await client.images.edit(image=[picture], prompt="123", model="tiny-text")
    assert reply.size == "200x100"
    request = (await worker.queue.get(job_of(reply))).request
    assert (request.prompt, request.mask, request.strength) == ("123", None, None), "a prompt stays text"
    assert (await worker.queue.source(job_of(reply))).mask is None


async def test_an_object_in_a_form(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    extra = {"sampler": {"name": "adaptive", "tolerance": 0.2, "exact": True}}
    reply = await client.images.edit(image=PICTURE, prompt="x", model="tiny-text", extra_body=extra)
    request = (await worker.queue.get(job_of(reply))).request
    assert isinstance(request.sampler, Adaptive)
    assert (request.sampler.tolerance, request.sampler.exact) == (0.2, True)


async def test_streaming(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    stream = await client.images.edit(
        image=PICTURE, prompt="apple", model="tiny-text", stream=True, partial_images=2, extra_body={"seed": 3}
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    last = events[-1]
    assert last.type == "image_edit.completed"
    assert b64decode(last.b64_json) == png(3)
    assert last.usage.input_tokens_details.image_tokens == PATCHES


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"image": b"no picture"}, "image"),
    ({"image": encoded(gradient(), "gif")}, "image"),
    ({"image": [PICTURE, PICTURE]}, "image"),
    ({"image": PICTURE[: len(PICTURE) // 2]}, "image"),
    ({"mask": encoded(mask(47, 32))}, "mask"),
    ({"mask": encoded(gradient())}, "mask"),
    ({"mask": encoded(mask(change=None))}, "mask"),
    ({"mask": b"no picture"}, "mask"),
    ({"prompt": ""}, "prompt"),
    ({"n": 11}, "n"),
    ({"size": "9x9"}, "size"),
    ({"quality": "max"}, "quality"),
    ({"background": "transparent"}, "background"),
    ({"input_fidelity": "high"}, "input_fidelity"),
    ({"markup": MASK}, "markup"),
    ({"complexity": "low"}, "complexity"),
    ({"svg": {"model": "x"}}, "svg"),
    ({"partial_images": 1}, "partial_images"),
    ({"extra_body": {"strength": 0}}, "strength"),
    ({"extra_body": {"strength": 1.5}}, "strength"),
    ({"extra_body": {"strength": "much"}}, "strength"),
    ({"extra_body": {"sampler": "euler"}}, "sampler"),
    ({"extra_body": {"unheard_of": "x"}}, "unheard_of"),
]


async def test_what_cannot_be_done_is_refused_by_name(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    for fields, param in IMPOSSIBLE:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.edit(**({"prompt": "x", "model": "tiny-text", "image": PICTURE} | fields))
        assert caught.value.param == param, fields
    assert worker.played == 0


async def test_a_form_that_is_none(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    boundary = {"Content-Type": "multipart/form-data; boundary=x"}
    for headers, content, status in [
        (boundary, b"", 400),
        (boundary, b"--x\r\nnonsense", 400),
        ({"Content-Type": "multipart/form-data"}, b"--x--", 400),
        ({"Content-Type": "text/plain"}, b"{}", 415),
    ]:
        reply = await http.post("/v1/images/edits", content=content, headers=headers)
        assert reply.status_code == status, content
        assert reply.json()["error"]["message"]
    for data in ({"prompt": "x" * (65 << 10)}, {f"field{number}": "x" for number in range(65)}):
        reply = await http.post("/v1/images/edits", data=data, files={"image": PICTURE})
        assert reply.status_code == 400
    reply = await http.post("/v1/images/edits", data={"image": "x", "prompt": "x"}, files={"mask": MASK})
    assert reply.json()["error"]["param"] == "image"


async def test_pictures_over_the_native_api(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body = {"model": "tiny-text", "prompt": "x", "image": base64(PICTURE), "mask": base64(MASK)}
    headers = {"Idempotency-Key": "k"}
    first = (await http.post("/v1/jobs", json=body, headers=headers)).json()
    assert first["request"]["image"] == f"sha256:{sha256(PICTURE).hexdigest()}"
    assert (await http.post("/v1/jobs", json=body, headers=headers)).json()["id"] == first["id"]
    other = body | {"image": base64(encoded(Image.new("RGB", (48, 32))))}
    assert (await http.post("/v1/jobs", json=other, headers=headers)).json()["code"] == "idempotency_conflict"
    events = (await http.get(f"/v1/jobs/{first['id']}/events")).text
    assert base64(PICTURE)[:100] not in events
    for change, field in [({"image": None}, "mask"), ({"mask": "?"}, "mask"), ({"image": "?"}, "image")]:
        reply = await http.post("/v1/jobs", json=body | change)
        assert (reply.status_code, reply.json()["field"]) == (422, field)


async def test_pictures_over_grpc(stub: pb_grpc.ImageServiceStub, worker: ScriptedWorker, queue: JobQueue) -> None:
    generation = pb.Generation(model="tiny-text", prompt="x", image=PICTURE, mask=MASK, strength=0.5)
    job = (await stub.SubmitJob(pb.SubmitJobRequest(generation=generation))).job
    assert (job.generation.width, job.generation.height, job.generation.strength) == (48, 32, 0.5)
    assert not job.generation.image, "a job does not repeat its picture"
    assert decoded((await queue.source(job.id)).image).tobytes() == gradient().tobytes()

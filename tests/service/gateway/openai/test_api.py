"""OpenAI's API, called with OpenAI's own client."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest

from patchforge.service.messages.partials import PartialImages
from patchforge.service.messages.samplers import Adaptive
from patchforge.service.queue import JobQueue
from tests.patience import PATIENCE
from tests.service.gateway.harness import CARDS, ScriptedWorker, ended, png
from tests.service.gateway.pictures import encoded, gradient


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as made:
        yield made


@pytest.fixture
def blocking_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as made:
        yield made


async def test_pictures_from_a_prompt(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.images.generate(
        prompt="a red apple", model="tiny-text", n=2, size="48x32", user="someone", extra_body={"seed": 7}
    )
    assert reply.data is not None
    assert [b64decode(image.b64_json or "") for image in reply.data] == [png(7), png(8)]
    assert reply.size == "48x32"
    assert reply.usage is not None
    assert reply.usage.input_tokens == reply.usage.input_tokens_details.text_tokens == 5
    assert reply.usage.output_tokens == 64
    ours: dict[str, Any] = reply.model_extra["patchforge"] if reply.model_extra else {}
    job = await worker.queue.get(ours["job_id"])
    assert ours["report"]["savings_ratio"] == pytest.approx(1 / 3)
    assert job.request.previews is False


async def test_the_blocking_client(blocking_client: openai.OpenAI, worker: ScriptedWorker) -> None:
    reply = await asyncio.to_thread(
        blocking_client.images.generate, prompt="apple", model="tiny-text", output_format="webp"
    )
    assert reply.output_format == "webp"
    assert reply.data is not None
    assert len(reply.data) == 1


async def test_a_size_and_a_format_reach_the_worker(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.images.generate(
        prompt="apple", model="tiny-text", size="1536x1024", output_format="webp", output_compression=30
    )
    assert reply.size == "1536x1024"
    assert reply.model_extra is not None
    request = (await worker.queue.get(reply.model_extra["patchforge"]["job_id"])).request
    assert (request.width, request.height, request.output_compression) == (1536, 1024, 30)
    reply = await client.images.generate(prompt="apple", model="tiny-text", size="auto", output_format="jpeg")
    assert reply.size == "48x32"
    assert reply.model_extra is not None
    request = (await worker.queue.get(reply.model_extra["patchforge"]["job_id"])).request
    assert (request.width, request.output_compression) == (None, 100), "OpenAI's default"


@pytest.mark.parametrize("wanted", [True, False])
async def test_metadata_can_be_declined(client: openai.AsyncOpenAI, worker: ScriptedWorker, wanted: bool) -> None:
    reply = await client.images.generate(prompt="apple", model="tiny-text", extra_body={"metadata": wanted})
    assert reply.model_extra is not None
    request = (await worker.queue.get(reply.model_extra["patchforge"]["job_id"])).request
    assert request.metadata is wanted


@pytest.mark.parametrize(
    ("quality", "level", "steps"), [("low", "low", 6), (None, "medium", 8), ("medium", "medium", 8), ("hd", "high", 16)]
)
async def test_qualities_are_presets_of_the_adaptive_sampler(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, quality: Any, level: str, steps: int
) -> None:
    reply = await client.images.generate(prompt="apple", model="tiny-text", quality=quality)
    assert reply.quality == level
    assert reply.model_extra is not None
    request = (await worker.queue.get(reply.model_extra["patchforge"]["job_id"])).request
    assert isinstance(request.sampler, Adaptive)
    assert request.steps == steps
    told = (await client.models.retrieve("tiny-text")).model_extra["patchforge"]["presets"]  # type: ignore[index]
    assert {"sampler": request.sampler.model_dump(), "steps": steps} in told.values()


async def test_a_url_instead_of_the_picture(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, worker: ScriptedWorker, url: str
) -> None:
    reply = await client.images.generate(
        prompt="apple", model="tiny-text", n=2, response_format="url", extra_body={"seed": 7}
    )
    assert reply.data is not None
    assert [image.b64_json for image in reply.data] == [None, None]
    assert (reply.data[0].url or "").startswith(f"{url}/v1/jobs/")
    assert [(await http.get(image.url or "")).content for image in reply.data] == [png(7), png(8)]


async def test_whoever_is_asking_is_named_in_the_answer(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.images.generate(prompt="apple", model="tiny-text", user="u", safety_identifier="")
    assert reply.safety_identifier == "u"
    reply = await client.images.generate(prompt="apple", model="tiny-text", user="u", safety_identifier="s")
    assert reply.safety_identifier == "s"


async def test_a_repeated_call_with_a_key_gets_the_same_job(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, queue: JobQueue
) -> None:
    """Even if its first caller disconnected: with a key, disconnecting cancels nothing."""
    worker.curtain.clear()
    headers = {"Idempotency-Key": "k"}
    call = asyncio.create_task(client.images.generate(prompt="apple", model="tiny-text", extra_headers=headers))
    job_id = await worker.next_job()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    worker.curtain.set()
    reply = await client.images.generate(prompt="apple", model="tiny-text", extra_headers=headers)
    assert reply.model_extra is not None
    assert reply.model_extra["patchforge"]["job_id"] == job_id
    assert worker.played == 1
    with pytest.raises(openai.BadRequestError) as caught:
        await client.images.generate(prompt="pear", model="tiny-text", extra_headers=headers)
    assert caught.value.code == "idempotency_conflict"


async def test_our_own_fields_travel_in_the_same_body(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    sampler = {"name": "look_ahead", "ratio": 2.0}
    extra = {"sampler": sampler, "steps": 3, "guidance": 1, "priority": "low", "deadline_seconds": 60}
    reply = await client.images.generate(prompt="apple", model="tiny-text", extra_body=extra)
    assert reply.model_extra is not None
    request = (await worker.queue.get(reply.model_extra["patchforge"]["job_id"])).request
    assert request.sampler is not None
    assert request.sampler.model_dump() == {"quantile": 0.4} | sampler
    assert (request.steps, request.guidance, request.priority, request.deadline_seconds) == (3, 1, "low", 60)


async def test_a_class_model_takes_the_prompt_as_its_class(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.images.generate(prompt="Grinning Face", model="tiny-class")
    assert reply.model_extra is not None
    request = (await worker.queue.get(reply.model_extra["patchforge"]["job_id"])).request
    assert (request.prompt, request.class_label) == (None, "grinning face")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.images.generate(prompt="unicorn", model="tiny-class")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("partials", [0, 1, 3])
async def test_streaming(client: openai.AsyncOpenAI, worker: ScriptedWorker, partials: int) -> None:
    stream = await client.images.generate(
        prompt="apple", model="tiny-text", stream=True, partial_images=partials, extra_body={"seed": 3}
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_generation.partial_image"] * partials + [
        "image_generation.completed"
    ]
    for number, event in enumerate(events[:-1]):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == number
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert b64decode(last.b64_json) == png(3)
    assert (last.size, last.background, last.output_format, last.quality) == ("48x32", "opaque", "png", "medium")
    assert last.usage.output_tokens == 32


def test_partial_images_are_spread_evenly_over_a_pictures_evaluations() -> None:
    partials = PartialImages(3)
    times = [evaluation for evaluation in range(1, 21) if partials.take(0, evaluation, 20) is not None]
    assert times == [5, 10, 15]


async def test_partial_images_come_although_the_worker_shows_too_few(
    client: openai.AsyncOpenAI, worker: ScriptedWorker
) -> None:
    """A picture may be finished after fewer evaluations than partial images were asked for."""
    worker.evaluations = 1
    stream = await client.images.generate(
        prompt="apple", model="tiny-text", n=2, stream=True, partial_images=3, extra_body={"seed": 3}
    )
    events = [event async for event in stream]
    partials = [event for event in events if event.type == "image_generation.partial_image"]
    numbers = {index: [] for index in (0, 1)}
    for event in partials:
        numbers[event.model_extra["patchforge"]["image_index"]].append(event.partial_image_index)
    assert numbers == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert [event.type for event in events[-2:]] == ["image_generation.completed"] * 2
    request = (await worker.queue.get(partials[0].model_extra["patchforge"]["job_id"])).request
    assert (request.previews, request.partial_images) == (True, 3), "the worker is told, and shows them although busy"


async def test_each_picture_of_a_stream_has_its_own_events(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    stream = await client.images.generate(
        prompt="apple", model="tiny-text", n=2, stream=True, partial_images=1, extra_body={"seed": 3}
    )
    events = [event async for event in stream]
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"] * 2
    assert [b64decode(event.b64_json) for event in events[2:]] == [png(3), png(4)]


async def test_hanging_up_on_a_synchronous_call_cancels_its_job(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    call = asyncio.create_task(client.images.generate(prompt="apple", model="tiny-text"))
    job_id = await worker.next_job()
    call.cancel()
    assert await ended(queue, job_id) == "cancelled"


async def test_hanging_up_on_a_stream_cancels_its_job(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    stream = await client.images.generate(prompt="apple", model="tiny-text", stream=True, partial_images=3)
    job_id = await worker.next_job()
    await stream.close()
    assert await ended(queue, job_id) == "cancelled"


async def test_a_job_that_fails(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.with_options(max_retries=2).images.generate(prompt="fail", model="tiny-text")
    assert caught.value.code == "out_of_memory"
    assert worker.played == 1, "the client was told not to try again"
    stream = await client.images.generate(prompt="fail", model="tiny-text", stream=True)
    with pytest.raises(openai.APIError, match="too big"):
        _ = [event async for event in stream]


async def test_a_job_cancelled_by_someone_else(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    call = asyncio.create_task(client.images.generate(prompt="apple", model="tiny-text"))
    await queue.cancel(await worker.next_job())
    with pytest.raises(openai.ConflictError, match="cancelled") as caught:
        await call
    assert (caught.value.code, caught.value.type) == ("job_cancelled", "invalid_request_error")


async def test_a_job_no_worker_was_free_for_in_time(client: openai.AsyncOpenAI, queue: JobQueue) -> None:
    """For generations and edits, with and without streaming."""
    await queue.announce("busy", CARDS)
    late: dict[str, Any] = {"prompt": "apple", "model": "tiny-text", "extra_body": {"deadline_seconds": 0.05}}
    patient = client.with_options(max_retries=2)
    for call in (patient.images.generate(**late), patient.images.edit(**late, image=encoded(gradient()))):
        with pytest.raises(openai.InternalServerError, match="before the deadline") as caught:
            await call
        assert (caught.value.status_code, caught.value.code) == (504, "job_expired")
        assert (caught.value.type, caught.value.param) == ("server_error", "deadline_seconds")
        assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError, match="before the deadline") as streamed:
        _ = [event async for event in await client.images.generate(**late, stream=True)]
    assert streamed.value.code == "job_expired"


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"size": "15x16"}, "size"),
    ({"size": "2049x16"}, "size"),
    ({"size": "2048x2048"}, "size"),
    ({"size": "large"}, "size"),
    ({"size": "64 x 64"}, "size"),
    ({"quality": "xhigh"}, "quality"),
    ({"quality": "max"}, "quality"),
    ({"quality": "high", "extra_body": {"sampler": "euler"}}, "quality"),
    ({"background": "transparent"}, "background"),
    ({"response_format": "url", "stream": True}, "response_format"),
    ({"response_format": "bytes"}, "response_format"),
    ({"output_compression": 50}, "output_compression"),
    ({"complexity": "low"}, "complexity"),
    ({"frame_count": 2, "output_format": "gif"}, "frame_count"),
    ({"frame_duration_ms": 100}, "frame_duration_ms"),
    ({"output_format": "svg"}, "output_format"),
    ({"svg": {"model": "gpt-5"}}, "svg"),
    ({"background": "transparent"}, "background"),
    ({"safety_identifier": "x" * 1001}, "safety_identifier"),
    ({"user": "x" * 1001}, "user"),
    ({"model": "x" * 101}, "model"),
    ({"prompt": "x" * 2001}, "prompt"),
    ({"style": "vivid"}, "style"),
    ({"moderation": "low"}, "moderation"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_compression": 101}, "output_compression"),
    ({"n": 11}, "n"),
    ({"n": 0}, "n"),
    ({"partial_images": 2}, "partial_images"),
    ({"stream": True, "partial_images": 4}, "partial_images"),
    ({"prompt": ""}, "prompt"),
    ({"extra_body": {"sampler": "ddim"}}, "sampler"),
    ({"extra_body": {"sampler": {"name": "dual_loop", "quantile": 2}}}, "sampler.quantile"),
    ({"extra_body": {"previews": True}}, "previews"),
    ({"extra_body": {"strength": 1}}, "strength"),
    ({"extra_body": {"image": "AAAA"}}, "image"),
    ({"extra_body": {"width": 64}}, "width"),
    ({"extra_body": {"unheard_of": 1}}, "unheard_of"),
]


async def test_what_cannot_be_done_is_refused_by_name(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    for fields, param in IMPOSSIBLE:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.generate(**({"prompt": "apple", "model": "tiny-text"} | fields))
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"


async def test_nulls_mean_the_default(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.images.generate(prompt="apple", model="tiny-text", n=None, size=None, background=None)
    assert reply.data is not None
    assert len(reply.data) == 1


async def test_models(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    models = {model.id: model async for model in client.models.list()}
    assert set(models) == {"tiny-class", "tiny-text"}
    one = await client.models.retrieve("tiny-class")
    assert one.created == 1_700_000_001
    assert one.model_extra is not None
    assert one.model_extra["patchforge"]["classes"] == ["cat", "grinning face"]
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-image-1")
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        await client.images.generate(prompt="apple", model="gpt-image-1")


async def test_without_a_worker(client: openai.AsyncOpenAI) -> None:
    assert [model async for model in client.models.list()] == []
    with pytest.raises(openai.InternalServerError) as caught:
        await client.images.generate(prompt="apple")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]

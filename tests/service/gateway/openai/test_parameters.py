"""Every parameter of the installed OpenAI client, with every value it lists, works or is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import openai
import pytest
from openai.resources.images import Images
from openai.types.image_edit_params import ImageEditParamsNonStreaming, ImageEditParamsStreaming
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming, ImageGenerateParamsStreaming

from tests.doc_snippets import ROOT
from tests.patience import PATIENCE
from tests.service.gateway.harness import ScriptedWorker
from tests.service.gateway.pictures import encoded, gradient, mask

CALLS = {
    "generate": (ImageGenerateParamsNonStreaming, ImageGenerateParamsStreaming),
    "edit": (ImageEditParamsNonStreaming, ImageEditParamsStreaming),
}
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
PICTURE = encoded(gradient())
NEEDED = {"generate": {"prompt": "a red apple"}, "edit": {"prompt": "a red apple", "image": PICTURE}}
NEEDED = {name: fields | {"model": "tiny-text"} for name, fields in NEEDED.items()}

WORKS: dict[str, list[Any]] = {
    "background": ["auto", "opaque"],
    "image": [PICTURE, [PICTURE]],
    "mask": [encoded(mask())],
    "model": ["tiny-text"],
    "moderation": ["auto"],
    "n": [1, 10],
    "output_compression": [0, 100],
    "output_format": ["png", "webp", "jpeg"],
    "partial_images": [0, 3],
    "prompt": ["a red apple", "x" * 2000],
    "quality": ["auto", "low", "medium", "high", "standard", "hd"],
    "response_format": ["b64_json", "url"],
    "safety_identifier": ["someone"],
    "size": ["auto", "256x256", "512x512", "1024x1024", "1536x1024", "1024x1536", "1792x1024", "1024x1792", "160x96"],
    "stream": [True, False],
    "user": ["someone"],
}
REFUSED: dict[str, list[Any]] = {
    "background": ["transparent"],
    "complexity": ["low", "medium", "high"],
    "frame_count": [9],
    "frame_duration_ms": [200],
    "image": [[PICTURE, PICTURE]],
    "input_fidelity": ["low", "high"],
    "markup": [encoded(mask())],
    "moderation": ["low"],
    "n": [0, 11],
    "output_compression": [101],
    "output_format": ["gif", "svg"],
    "partial_images": [4],
    "prompt": ["x" * 2001],
    "quality": ["xhigh", "max"],
    "size": ["3840x2160"],
    "style": ["vivid", "natural"],
    "svg": [{"model": "gpt-5", "reasoning": {"effort": "low"}}],
}
BESIDE = {"partial_images": {"stream": True}, "output_compression": {"output_format": "webp"}}
"""Other parameters that a parameter requires, by OpenAI's documentation."""


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as made:
        yield made


async def ask(client: openai.AsyncOpenAI, call: str, name: str, value: Any) -> None:
    """Reads the response to its end, streamed or not."""
    fields = NEEDED[call] | BESIDE.get(name, {}) | {name: value}
    reply = await getattr(client.images, call)(**fields)
    if fields.get("stream"):
        kinds = [event.type async for event in reply]
        assert kinds[-1].endswith(".completed")
    else:
        assert len(reply.data) == fields.get("n", 1)


def parameters(call: str) -> set[str]:
    return set(inspect.signature(getattr(Images, call)).parameters) - TRANSPORT


def listed(annotation: Any) -> Iterator[Any]:
    """The values that an annotation lists."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from listed(part)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_the_client_knows_is_left_out(call: str) -> None:
    """Fails if a newer client has a new parameter or a new value: decide here what to do with it."""
    assert parameters(call) <= WORKS.keys() | REFUSED.keys()
    for shape in CALLS[call]:
        for name, annotation in get_type_hints(shape).items():
            ours = WORKS.get(name, []) + REFUSED.get(name, [])
            named = [] if name == "model" else listed(annotation)  # OpenAI's models are not served here
            assert [value for value in named if value not in ours] == [], name


@pytest.mark.parametrize("call", CALLS)
async def test_what_works(client: openai.AsyncOpenAI, worker: ScriptedWorker, call: str) -> None:
    for name in sorted(parameters(call) & WORKS.keys()):
        for value in WORKS[name]:
            await ask(client, call, name, value)


@pytest.mark.parametrize("call", CALLS)
async def test_what_is_refused(client: openai.AsyncOpenAI, worker: ScriptedWorker, call: str) -> None:
    for name in sorted(parameters(call) & REFUSED.keys()):
        for value in REFUSED[name]:
            with pytest.raises(openai.BadRequestError) as caught:
                await ask(client, call, name, value)
            assert (caught.value.param, caught.value.type) == (name, "invalid_request_error"), (name, value)
    assert worker.played == 0


@pytest.mark.parametrize("name", WORKS)
def test_what_works_is_documented(name: str) -> None:
    _, _, section = (ROOT / "docs" / "api.md").read_text("utf-8").partition("## OpenAI's Images API")
    assert f"`{name}`" in section.partition("\n## ")[0]

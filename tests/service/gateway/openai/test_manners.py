"""What clients, browsers and frameworks send beside what the documentation says: harmless oddities are taken."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from patchforge.service.messages.schemas import GenerationRequest
from tests.service.gateway.harness import ScriptedWorker
from tests.service.gateway.pictures import base64, decoded, encoded, gradient, mask

EDITS, GENERATIONS = "/v1/images/edits", "/v1/images/generations"
PICTURE = encoded(gradient())
MASK = encoded(mask())
URL = f"data:image/png;base64,{base64(PICTURE)}"
ASKED = {"prompt": "a red apple", "model": "tiny-text"}


async def drawn(worker: ScriptedWorker, reply: httpx.Response) -> tuple[str, GenerationRequest]:
    """The id and the request of the job that a call made."""
    assert reply.status_code == 200, reply.text
    job_id: str = reply.json()["patchforge"]["job_id"]
    return job_id, (await worker.queue.get(job_id)).request


@pytest.mark.parametrize(
    "fields",
    [
        {"images": [{"image_url": URL}]},
        {"images": [{"image_url": URL}], "mask": {"image_url": f"data:image/png;base64,{base64(MASK)}"}},
        {"images": [{"image_url": {"url": URL}}], "mask": None},
        {"image": URL},
        {"image": [URL], "mask": base64(MASK)},
        {"image": base64(PICTURE), "n": 1.0, "stream": None},
    ],
)
async def test_an_edit_as_json(http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, Any]) -> None:
    job_id, request = await drawn(worker, await http.post(EDITS, json=ASKED | fields))
    source = await worker.queue.source(job_id)
    assert decoded(source.image).tobytes() == gradient().tobytes()
    assert (request.mask is None) is (source.mask is None) is (not fields.get("mask"))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "image", "required"),
        ({"images": []}, "images", "one entry"),
        ({"images": [{"image_url": URL}] * 2}, "images", "only one picture"),
        ({"images": [{"image_url": URL}], "image": URL}, "images", "only one of"),
        ({"images": [{"file_id": "file-1"}]}, "images", "data URL"),
        ({"images": [{}]}, "images", "image_url"),
        ({"images": [{"image_url": "https://example.com/a.png"}]}, "image", "fetches no addresses"),
        ({"images": [{"image_url": "data:image/png,raw"}]}, "image", "base64"),
        ({"images": [{"image_url": "data:image/png;base64,AAAA"}]}, "image", "PNG, WebP or JPEG"),
        ({"images": URL, "mask": {"file_id": "file-1"}}, "mask", "data URL"),
        ({"images": [{"image_url": URL}], "unheard_of": 1}, "unheard_of", ""),
    ],
)
async def test_an_edit_as_json_that_cannot_be_made(
    http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, Any], param: str, says: str
) -> None:
    reply = await http.post(EDITS, json=ASKED | fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert says in error["message"]
    assert worker.played == 0


@pytest.mark.parametrize("key", ["image", "image[]", "image[0]"])
@pytest.mark.parametrize("mask_key", ["mask", "mask[]", "mask[0]"])
async def test_lists_in_forms_are_written_in_many_ways(
    http: httpx.AsyncClient, worker: ScriptedWorker, key: str, mask_key: str
) -> None:
    files = {key: ("a.png", PICTURE), mask_key: ("b.png", MASK)}
    _, request = await drawn(worker, await http.post(EDITS, data=ASKED, files=files))
    assert request.image
    assert request.mask


async def test_two_pictures_are_one_too_many(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    files = {"image[0]": PICTURE, "image[1]": PICTURE}
    error = (await http.post(EDITS, data=ASKED, files=files)).json()["error"]
    assert (error["param"], "only one picture" in error["message"]) == ("image", True)


async def test_parts_of_a_form_that_nobody_filled_in(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    empty = dict.fromkeys(("n", "seed", "size", "quality", "user", "stream", "response_format", "strength"), "")
    files = {"image": ("a.png", PICTURE), "mask": ("", b"")}
    _, request = await drawn(worker, await http.post(EDITS, data=ASKED | empty, files=files))
    assert (request.n, request.mask, request.strength) == (1, None, None)
    for missing, data, sent in (
        ("image", ASKED, {"image": ("", b"")}),
        ("prompt", ASKED | {"prompt": ""}, {"image": PICTURE}),
    ):
        error = (await http.post(EDITS, data=data, files=sent)).json()["error"]
        assert error["param"] == missing


@pytest.mark.parametrize(
    ("yes", "no"), [("true", "false"), ("True", "False"), ("TRUE", "FALSE"), ("1", "0"), ("on", "off"), ("true", "")]
)
async def test_switches_in_forms(http: httpx.AsyncClient, worker: ScriptedWorker, yes: str, no: str) -> None:
    reply = await http.post(EDITS, data=ASKED | {"stream": yes, "deterministic": no}, files={"image": PICTURE})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "image_edit.completed" in reply.text
    reply = await http.post(EDITS, data=ASKED | {"stream": "maybe"}, files={"image": PICTURE})
    assert reply.json()["error"]["param"] == "stream"


async def test_every_field_may_be_null_or_left_empty(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    optional = (
        *("n", "size", "quality", "style", "background", "moderation", "output_format", "output_compression"),
        *("response_format", "stream", "partial_images", "user", "safety_identifier", "seed", "sampler", "steps"),
    )
    for nothing in (None, ""):
        _, request = await drawn(worker, await http.post(GENERATIONS, json=ASKED | dict.fromkeys(optional, nothing)))
        assert (request.n, request.output_format, request.output_compression) == (1, "png", 100)


async def test_null_is_the_default_in_the_native_api_too(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    nothing = dict.fromkeys(GenerationRequest.model_fields.keys() - {"prompt"})
    wanted = ASKED | nothing | {"model": "tiny-text", "sampler": {"name": "dual_loop", "quantile": None, "exact": None}}
    reply = await http.post("/v1/jobs", json=wanted)
    assert reply.status_code == 202, reply.text
    request = reply.json()["request"]
    assert (request["n"], request["previews"], request["priority"]) == (1, True, "normal")
    assert request["sampler"] == {"name": "dual_loop", "quantile": 0.4, "inner_steps": 4, "exact": False}
    reply = await http.post("/v1/jobs", json=ASKED | {"unheard_of": None})
    assert reply.json()["field"] == "unheard_of", "a name that is not known is not known as null either"


@pytest.mark.parametrize(
    ("number", "taken"), [("1.0", 1), ("2e0", 2), ("1.5", None), ("1e300", None), ("9" * 30, None)]
)
async def test_whole_numbers_however_they_are_written(
    http: httpx.AsyncClient, worker: ScriptedWorker, number: str, taken: int | None
) -> None:
    content = f'{{"prompt": "x", "model": "tiny-text", "n": {number}, "guidance": 2.0, "sampler": '
    content += '{"name": "dual_loop", "inner_steps": 4.0}}'
    for path in ("/v1/jobs", GENERATIONS):
        reply = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        if taken is None:
            assert reply.status_code in (400, 422)
            continue
        assert reply.is_success, reply.text
        body = reply.json()
        request = (await worker.queue.get(body.get("id") or body["patchforge"]["job_id"])).request
        assert (request.n, request.guidance) == (taken, 2.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"style": "vivid"}, "not supported; describe the style in `prompt`"),
        ({"moderation": "low"}, "not supported; nothing is moderated here"),
        ({"background": "transparent"}, "not supported; every picture is opaque"),
        ({"input_fidelity": "high"}, "not supported; use `strength`"),
        ({"complexity": "low"}, "not supported; leave it out"),
        ({"width": 64}, "not supported here; use `size`"),
    ],
)
async def test_refusals_say_what_to_do(
    http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, Any], says: str
) -> None:
    for reply in (
        await http.post(GENERATIONS, json=ASKED | fields),
        await http.post(EDITS, data=ASKED | fields, files={"image": PICTURE}),
    ):
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, *fields)
        assert error["message"].startswith(says)


@pytest.mark.parametrize("model", [{}, {"model": ""}, {"model": None}, {"model": "dall-e-2"}])
async def test_a_prompt_without_a_model_goes_to_a_text_model(
    http: httpx.AsyncClient, worker: ScriptedWorker, model: dict[str, Any]
) -> None:
    """`dall-e-2` is what LangChain and LiteLLM send if their user names none."""
    for reply in (
        await http.post(GENERATIONS, json={"prompt": "cat"} | model),
        await http.post(EDITS, data={"prompt": "cat"} | model, files={"image": PICTURE}),
    ):
        _, request = await drawn(worker, reply)
        assert (request.model, request.prompt) == ("tiny-text", "cat")


async def test_a_picture_comes_in_both_forms_unless_one_is_chosen(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    """LangChain knows only `url`, and most others only `b64_json`."""
    for chosen, forms in (({}, {"url", "b64_json"}), ({"response_format": "url"}, {"url"}), (None, {"b64_json"})):
        fields = {"response_format": "b64_json"} if chosen is None else chosen
        [image] = (await http.post(GENERATIONS, json=ASKED | fields)).json()["data"]
        assert image.keys() == forms


async def test_variations_are_refused_in_words_that_help(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    reply = await http.post("/v1/images/variations", files={"image": PICTURE})
    assert reply.status_code == 404
    assert "/v1/images/edits" in reply.json()["error"]["message"]

"""OpenAI's Python client: python openai_python.py HTTP_URL GRPC_ADDRESS."""

import json
import sys
import time
import urllib.request
from base64 import b64decode, b64encode

import openai
from report import check, is_png, packages, png, refused

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)
TEXT = "emoji-text"
packages("openai")


@check("models")
def _() -> None:
    names = [model.id for model in client.models.list()]
    assert TEXT in names, names
    assert client.models.retrieve(TEXT).owned_by == "patchforge"


@check("generate, without a model")
def _() -> None:
    made = client.images.generate(prompt="red apple", size="256x256", n=2)
    assert [is_png(b64decode(image.b64_json or "")) for image in made.data or []] == [True, True]
    assert made.usage
    assert made.usage.total_tokens > 0


@check("pictures by URL")
def _() -> None:
    made = client.images.generate(prompt="red apple", model=TEXT, response_format="url")
    with urllib.request.urlopen((made.data or [])[0].url or "") as answer:
        assert is_png(answer.read())


@check("stream, 0 to 3 partial images of each picture")
def _() -> None:
    for wanted in range(4):
        stream = client.images.generate(
            prompt="red apple", model=TEXT, n=2, quality="low", stream=True, partial_images=wanted
        )
        events = list(stream)
        assert [event.type for event in events[-2:]] == ["image_generation.completed"] * 2
        assert len(events) == 2 + 2 * wanted, (wanted, len(events))


@check("edit with a mask")
def _() -> None:
    files = {"image": ("a.png", png(64, 64)), "mask": ("m.png", png(64, 64, alpha=True))}
    made = client.images.edit(model=TEXT, prompt="green apple", quality="low", **files)
    assert is_png(b64decode((made.data or [])[0].b64_json or ""))


@check("edit of a list of one, streamed")
def _() -> None:
    stream = client.images.edit(
        model=TEXT, prompt="green apple", image=[png(64, 64)], quality="low", stream=True, partial_images=2
    )
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"], kinds


@check("edit as JSON, with a data URL")
def _() -> None:
    url = f"data:image/png;base64,{b64encode(png(64, 64)).decode()}"
    body = {"model": TEXT, "prompt": "green apple", "images": [{"image_url": url}], "quality": "low"}
    made = client.post("/images/edits", body=body, cast_to=openai.types.ImagesResponse)
    assert is_png(b64decode((made.data or [])[0].b64_json or ""))


@check("negative prompt and seed in extra_body")
def _() -> None:
    drawn = []
    for negative in ({}, {"negative_prompt": ""}, {"negative_prompt": "red"}):
        extra = {"seed": 7, "deterministic": True, **negative}
        made = client.images.generate(prompt="apple", model=TEXT, quality="low", extra_body=extra)
        drawn.append((made.data or [])[0].b64_json)
    assert drawn[0] == drawn[1] != drawn[2]


@check("batches: file, state, results, errors, cancel")
def _() -> None:
    bodies = {"good": {"prompt": "red apple", "quality": "low"}, "wrong": {"prompt": "red apple", "style": "vivid"}}
    url = "/v1/images/generations"
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) for name, body in bodies.items()
    ]
    file = client.files.create(file="\n".join(lines).encode(), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    while batch.status in ("in_progress", "finalizing"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.request_counts
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    good = json.loads(client.files.content(batch.output_file_id or "").text)
    made = openai.types.ImagesResponse.model_validate(good["response"]["body"])
    assert is_png(b64decode((made.data or [])[0].b64_json or ""))
    wrong = json.loads(client.files.content(batch.error_file_id or "").text)
    assert (wrong["custom_id"], wrong["response"]["body"]["error"]["param"]) == ("wrong", "style")
    assert batch.id in [each.id for each in client.batches.list()]
    other = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    assert client.batches.cancel(other.id).status in ("cancelling", "completed")
    assert client.files.delete(file.id).deleted


@check("retired parameters refused in words that help")
def _() -> None:
    error = refused(openai.BadRequestError, lambda: client.images.generate(prompt="apple", model=TEXT, style="vivid"))
    assert error.param == "style"
    assert "not supported" in error.message

"""LiteLLM: python litellm_python.py HTTP_URL GRPC_ADDRESS."""

import asyncio
import sys
from base64 import b64decode
from io import BytesIO

import litellm
from report import check, is_png, packages, png

HOW = {"api_base": f"{sys.argv[1]}/v1", "api_key": "unused"}
TEXT = "openai/emoji-text"
packages("litellm")


@check("image_generation")
def _() -> None:
    made = litellm.image_generation(prompt="red apple", model=TEXT, n=2, size="256x256", **HOW)
    assert [is_png(b64decode(image["b64_json"])) for image in made.data] == [True, True]


@check("image_generation as of dall-e-2, with all its parameters")
def _() -> None:
    wish = {"n": 1, "quality": "standard", "size": "1024x1024", "user": "me"}
    made = litellm.image_generation(prompt="red apple", model="openai/dall-e-2", **wish, **HOW)
    assert is_png(b64decode(made.data[0]["b64_json"]))


@check("aimage_generation")
def _() -> None:
    made = asyncio.run(litellm.aimage_generation(prompt="red apple", model=TEXT, **HOW))
    assert is_png(b64decode(made.data[0]["b64_json"]))


@check("image_edit")
def _() -> None:
    picture, mask = BytesIO(png(64, 64)), BytesIO(png(64, 64, alpha=True))
    picture.name, mask.name = "a.png", "m.png"
    made = litellm.image_edit(image=picture, mask=mask, prompt="green apple", model=TEXT, **HOW)
    assert is_png(b64decode(made.data[0]["b64_json"]))

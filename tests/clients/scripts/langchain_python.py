"""LangChain's wrapper of OpenAI's images: python langchain_python.py HTTP_URL GRPC_ADDRESS."""

import sys
import urllib.request

from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from report import check, is_png, packages

HOW = {"base_url": f"{sys.argv[1]}/v1", "api_key": "unused"}
packages("langchain-community")


def fetch(urls: str) -> None:
    for url in urls.split("\n"):
        with urllib.request.urlopen(url) as answer:
            assert is_png(answer.read())


@check("DallEAPIWrapper with its defaults")
def _() -> None:
    fetch(DallEAPIWrapper(**HOW).run("red apple"))


@check("DallEAPIWrapper with a model, two pictures")
def _() -> None:
    urls = DallEAPIWrapper(model="emoji-text", n=2, size="256x256", quality="standard", **HOW).run("red apple")
    assert urls.count("\n") == 1
    fetch(urls)


@check("as an agent's tool")
def _() -> None:
    fetch(OpenAIDALLEImageGenerationTool(api_wrapper=DallEAPIWrapper(**HOW)).run("red apple"))

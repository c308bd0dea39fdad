"""What the tensors of the Open Inference Protocol mean here, the same over REST and gRPC."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from itertools import chain
from typing import Any

from PIL import Image

from service.errors import InvalidRequest, NotFound, Unavailable
from service.events import Completed
from service.gateway.jobs import JobService
from service.gateway.tensors import BYTES, Given, Made, made
from service.gateway.validation import parse_json, printable, validated
from service.outcomes import raise_if_lost
from service.schemas import GenerationRequest, ModelCard, SavingsReport
from service.threads import in_thread

SERVER = "patchforge"
VERSION = version("patchforge")
EXTENSIONS = ("binary_tensor_data",)
MODEL_VERSION = "1"

INPUTS = {
    "prompt": BYTES,
    "class_label": BYTES,
    "n": "INT32",
    "seed": "INT64",
    "steps": "INT32",
    "guidance": "FP32",
    "sampler": BYTES,
    "width": "INT32",
    "height": "INT32",
    "image": BYTES,
    "mask": BYTES,
    "strength": "FP32",
}
"""Each of one element; ``sampler`` is a name or a JSON object, ``image`` and ``mask`` are files."""
FILES = ("image", "mask")


@dataclass(frozen=True)
class Meta:
    """A tensor as a model's metadata show it; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """The pictures of a job and what they cost."""

    pictures: list[bytes]
    """PNG."""
    report: SavingsReport
    card: ModelCard


def _pixels(drawn: Drawn) -> Made:
    pictures = [Image.open(BytesIO(png)).convert("RGB") for png in drawn.pictures]
    width, height = pictures[0].size
    return Made("image", "UINT8", (len(pictures), height, width, 3), b"".join(each.tobytes() for each in pictures))


def _of_each(name: str, datatype: str, of: str) -> Callable[[Drawn], Made]:
    def tensor(drawn: Drawn) -> Made:
        numbers = [getattr(image, of) for image in drawn.report.images]
        return made(name, datatype, (len(numbers),), numbers)

    return tensor


def _patches(name: str, datatype: str, of: str) -> Callable[[Drawn], Made]:
    def tensor(drawn: Drawn) -> Made:
        lists = [getattr(image, of) for image in drawn.report.images]
        return made(name, datatype, (len(lists), *drawn.card.grid), list(chain(*lists)))

    return tensor


def _savings(drawn: Drawn) -> Made:
    return made("savings_ratio", "FP64", (1,), [drawn.report.savings_ratio])


OUTPUTS: dict[str, tuple[str, Callable[[Drawn], Made]]] = {
    "image": ("UINT8", _pixels),
    "savings_ratio": ("FP64", _savings),
    "seed": ("INT64", _of_each("seed", "INT64", "seed")),
    "patch_evaluations": ("INT64", _of_each("patch_evaluations", "INT64", "patch_evaluations")),
    "dense_patch_evaluations": ("INT64", _of_each("dense_patch_evaluations", "INT64", "dense_patch_evaluations")),
    "difficulty": ("FP32", _patches("difficulty", "FP32", "difficulty")),
    "finished_at": ("INT32", _patches("finished_at", "INT32", "finished_at")),
}


async def find(service: JobService, name: str, model_version: str) -> ModelCard:
    """The model of that name; each has the one version ``1``. Raises NotFound."""
    if model_version not in ("", MODEL_VERSION):
        raise NotFound(f"no such version; there is {MODEL_VERSION}", field="model_version")
    return await service.model(name)


async def is_ready(service: JobService, name: str | None = None, model_version: str = "") -> bool:
    """Whether the server, or one model of it, can be asked for pictures."""
    try:
        await service.ready()
        if name is not None:
            await find(service, name, model_version)
    except (Unavailable, NotFound):
        return False
    return True


def inputs_of(card: ModelCard) -> list[Meta]:
    """What a model takes."""
    subject = {"text": "class_label", "class": "prompt"}[card.kind]
    return [Meta(name, datatype, (1,)) for name, datatype in INPUTS.items() if name != subject]


def outputs_of(card: ModelCard) -> list[Meta]:
    """What it makes."""
    shapes = {
        "image": (-1, -1, -1, 3),
        "savings_ratio": (1,),
        "difficulty": (-1, *card.grid),
        "finished_at": (-1, *card.grid),
    }
    return [Meta(name, datatype, shapes.get(name, (-1,))) for name, (datatype, _) in OUTPUTS.items()]


def known(name: str) -> str:
    """``name``, if an input has it. Raises :class:`InvalidRequest`; from then on the name may be repeated as it is."""
    if name not in INPUTS:
        raise InvalidRequest("no such input", field=printable(name))
    return name


def generation_from(card: ModelCard, inputs: Sequence[Given]) -> GenerationRequest:
    """Of inputs that are known. Raises :class:`InvalidRequest` naming the one at fault."""
    fields: dict[str, Any] = {"model": card.name, "previews": False}
    for given in inputs:
        if given.name in fields:
            raise InvalidRequest("is given twice", field=given.name)
        fields[given.name] = _value(given)
    return validated(GenerationRequest, fields)


def wanted(names: Sequence[str]) -> list[str]:
    """The outputs asked for: all, if none is named. Raises InvalidRequest."""
    for name in names:
        if name not in OUTPUTS:
            raise InvalidRequest(f"no such output as {printable(name)}", field="outputs")
    return list(dict.fromkeys(names)) or list(OUTPUTS)


async def draw(
    service: JobService, tenant: str | None, card: ModelCard, inputs: Sequence[Given], names: Sequence[str]
) -> list[Made]:
    """The outputs ``names`` of a job that belongs to this call. Raises JobFailed."""
    async with await service.run(generation_from(card, inputs), tenant) as run:
        async for _, event in run:
            raise_if_lost(event)
            if isinstance(event, Completed):
                pictures = []
                if "image" in names:
                    pictures = [await service.image(run.job, index) for index in range(run.job.request.n)]
                drawn = Drawn(pictures, event.report, card)
                return await in_thread(_tensors, drawn, names)
    raise Unavailable("the job's events broke off")


def _tensors(drawn: Drawn, names: Sequence[str]) -> list[Made]:
    return [OUTPUTS[name][1](drawn) for name in names]


def _value(given: Given) -> Any:
    element = given.only
    if INPUTS[given.name] != BYTES:
        if given.datatype == BYTES or isinstance(element, bytes | str):
            raise InvalidRequest("must be a number", field=given.name)
        return element
    if given.datatype != BYTES or not isinstance(element, bytes):
        raise InvalidRequest("must be of datatype BYTES", field=given.name)
    if given.name in FILES:
        return b64encode(element).decode("ascii")
    try:
        text = element.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("must be UTF-8", field=given.name) from None
    if given.name == "sampler" and text.lstrip().startswith("{"):
        return parse_json(element)
    return text

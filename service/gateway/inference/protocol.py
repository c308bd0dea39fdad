"""The models' inputs and outputs as tensors of the Open Inference Protocol, the same over REST and gRPC."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from itertools import chain
from typing import Any

from PIL import Image

from patchforge.service.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from patchforge.service.gateway.inference.tensors import BYTES, Input, Output, pack_output
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.validation import parse_json, printable, validated
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, SavingsReport
from patchforge.service.threads import in_thread

SERVER = "patchforge"
VERSION = version("patchforge")
EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")
MODEL_VERSION = "1"

INPUTS = {
    "prompt": BYTES,
    "negative_prompt": BYTES,
    "class_label": BYTES,
    "n": "INT32",
    "seed": "INT64",
    "steps": "INT32",
    "guidance": "FP32",
    "budget": "INT64",
    "budget_share": "FP32",
    "finish_within_seconds": "FP32",
    "degrade": "BOOL",
    "sampler": BYTES,
    "width": "INT32",
    "height": "INT32",
    "fit": BYTES,
    "image": BYTES,
    "mask": BYTES,
    "strength": "FP32",
    "model_digest": BYTES,
}
"""Datatypes of the inputs, which have one element each. `sampler` is a name or a JSON object; files are bytes."""
FILES = ("image", "mask")
MAGIC = (b"\x89PNG", b"RIFF", b"\xff\xd8")
"""How files of the formats we take begin. Other bytes are base64: JSON cannot hold a file itself."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a model's metadata. A size of -1 means any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Wish:
    """What a call asks for."""

    inputs: Sequence[Input]
    outputs: Sequence[str]
    """Names, each once."""
    parameters: Mapping[str, Any]
    """Those of the whole request, whoever they are meant for."""


@dataclass(frozen=True)
class Result:
    """A completed job: its pictures and its report."""

    pictures: list[bytes]
    """PNG files; empty if no output needs them."""
    report: SavingsReport


OUTPUTS = {
    "image": "UINT8",
    "savings_ratio": "FP64",
    "prompt_truncated": "BOOL",
    "seed": "INT64",
    "patch_evaluations": "INT64",
    "dense_patch_evaluations": "INT64",
    "difficulty": "FP32",
    "finished_at": "INT32",
}
"""Datatypes of the outputs. All but `image` and those per job are fields of `ImageReport`: one row per picture."""
PER_JOB = ("savings_ratio", "prompt_truncated")
"""Fields of `SavingsReport`."""
PER_PATCH = ("difficulty", "finished_at")
"""Outputs with one value per patch, in the shape of the picture's grid."""


async def find_model(service: JobService, name: str, model_version: str) -> ModelCard:
    """Returns the model of that name. Every model has the single version `1`.

    Raises:
        NotFound: there is no such model or version.
        Unavailable: no worker serves any model.
    """
    if model_version not in ("", MODEL_VERSION):
        raise NotFound(f"no such version: the only one is {MODEL_VERSION}", field="model_version")
    return await service.model(name)


async def is_ready(service: JobService, name: str | None = None, model_version: str = "") -> bool:
    """Whether the server, or one of its models, is ready for requests."""
    try:
        await service.ready()
        if name is not None:
            await find_model(service, name, model_version)
    except (Unavailable, NotFound, Unsupported):
        return False
    return True


def describe_bundle(card: ModelCard) -> dict[str, str]:
    """Which bundle a model is, as far as its worker tells."""
    told = {"digest": card.digest, "weights_sha256": card.weights_sha256}
    return {name: digest for name, digest in told.items() if digest is not None}


def describe_inputs(card: ModelCard) -> list[TensorInfo]:
    """The inputs that a model takes."""
    others = {"text": ("class_label",), "class": ("prompt", "negative_prompt")}[card.kind]
    return [TensorInfo(name, datatype, (1,)) for name, datatype in INPUTS.items() if name not in others]


def describe_outputs(card: ModelCard) -> list[TensorInfo]:
    """The outputs that a model makes."""
    grid = (-1, -1) if card.sizes else card.grid
    shapes = {"image": (-1, -1, -1, 3)} | dict.fromkeys(PER_JOB, (1,)) | dict.fromkeys(PER_PATCH, (-1, *grid))
    return [TensorInfo(name, datatype, shapes.get(name, (-1,))) for name, datatype in OUTPUTS.items()]


def check_input_name(name: str) -> str:
    """Returns `name` if it is an input's. After this check, error messages may repeat it.

    Raises:
        InvalidRequest: there is no such input.
    """
    if name not in INPUTS:
        raise InvalidRequest("no such input", field=printable(name))
    return name


def build_generation(card: ModelCard, wish: Wish) -> GenerationRequest:
    """Makes a request from inputs with checked names, and from parameters of the same names.

    Other parameters are passed over, as the protocol demands: clients send some of their own.

    Raises:
        InvalidRequest: `field` names the first input that is not valid.
    """
    fields: dict[str, Any] = {}
    for tensor in wish.inputs:
        if tensor.name in fields:
            raise InvalidRequest("is given more than once", field=tensor.name)
        fields[tensor.name] = _read_value(tensor)
    for name, value in wish.parameters.items():
        if name in INPUTS and name not in FILES and value is not None:
            if name in fields:
                raise InvalidRequest("is given as an input and as a parameter", field=name)
            fields[name] = _read_sampler(value) if name == "sampler" and isinstance(value, str) else _whole(name, value)
    return validated(GenerationRequest, fields | {"model": card.name, "previews": False})


def select_outputs(names: Sequence[str]) -> list[str]:
    """The requested outputs without repetitions; all of them if `names` is empty.

    Raises:
        InvalidRequest: there is no such output.
    """
    for name in names:
        if name not in OUTPUTS:
            raise InvalidRequest(f"no such output: {printable(name)}", field="outputs")
    return list(dict.fromkeys(names)) or list(OUTPUTS)


async def infer(service: JobService, tenant: str | None, card: ModelCard, wish: Wish) -> list[Output]:
    """Runs a job that belongs to this call, and returns its outputs.

    Raises:
        JobFailed: the job failed, was cancelled or expired.
        InvalidRequest: an input is not valid. `JobService.submit` lists further errors.
    """
    counts, began = service.statistics.of(card.name), time.monotonic()
    try:
        result = await _draw(service, tenant, card, wish)
        outputs = await in_thread(make_outputs, result, wish.outputs)
    except BaseException:
        counts.fail.add(time.monotonic() - began)
        raise
    counts.succeeded(len(result.report.images), time.monotonic() - began, result.report.queue_seconds)
    return outputs


async def _draw(service: JobService, tenant: str | None, card: ModelCard, wish: Wish) -> Result:
    async with await service.run(build_generation(card, wish), tenant, quiet=True) as run:
        wanted, pictures = "image" in wish.outputs, []
        report = (await run.completed(pictures=wanted)).report
        if wanted:
            pictures = await asyncio.gather(*(run.image(index) for index in range(run.job.request.n)))
        return Result(pictures, report)


def make_outputs(result: Result, names: Sequence[str]) -> list[Output]:
    """Makes the outputs of these names."""
    return [_make_output(result, name) for name in names]


def _make_output(result: Result, name: str) -> Output:
    if name == "image":
        pictures = [Image.open(BytesIO(png)).convert("RGB") for png in result.pictures]
        width, height = pictures[0].size
        return Output(name, "UINT8", (len(pictures), height, width, 3), b"".join(each.tobytes() for each in pictures))
    if name in PER_JOB:
        return pack_output(name, OUTPUTS[name], (1,), [getattr(result.report, name)])
    rows = [getattr(image, name) for image in result.report.images]
    if name in PER_PATCH:
        grid = result.report.grid_rows, result.report.grid_columns
        return pack_output(name, OUTPUTS[name], (len(rows), *grid), list(chain(*rows)))
    return pack_output(name, OUTPUTS[name], (len(rows),), rows)


def _read_value(tensor: Input) -> Any:
    """The value of an input as the field of the same name takes it."""
    element = tensor.only
    if INPUTS[tensor.name] != BYTES:
        if tensor.datatype == BYTES or isinstance(element, bytes | str):
            raise InvalidRequest("must be a number", field=tensor.name)
        return _whole(tensor.name, element)
    if tensor.datatype != BYTES or not isinstance(element, bytes):
        raise InvalidRequest("must have datatype BYTES", field=tensor.name)
    if tensor.name in FILES and (element.startswith(MAGIC) or not element.isascii()):
        return b64encode(element).decode("ascii")
    try:
        text = element.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("must be UTF-8 text", field=tensor.name) from None
    return _read_sampler(text) if tensor.name == "sampler" else text


def _read_sampler(text: str) -> Any:
    """A sampler's name, or a JSON object."""
    return parse_json(text.encode("utf-8", "replace")) if text.lstrip().startswith("{") else text


def _whole(name: str, value: Any) -> Any:
    """A number for an input of integers, without a fraction that is 0."""
    whole = INPUTS[name].startswith("INT") and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value

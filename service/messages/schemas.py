"""Requests, jobs and reports: what clients, gateway, queue and worker exchange. Needs neither torch nor Redis."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from patchforge.service.messages.base import Message, Request, field_error
from patchforge.service.messages.fit import Fit, Size, nearest_native
from patchforge.service.messages.partials import MAX_PARTIAL_IMAGES
from patchforge.service.messages.samplers import MAX_STEPS, MAX_TOLERANCE, Quality, Sampler

MAX_IMAGES = 10
MAX_PROMPT = 2000
MAX_SEED = 2**63 - 1
MIN_SIDE, MAX_SIDE = 16, 2048
STRENGTH = 0.6
"""How far a picture to start from may change by default: enough for other details, too little for another subject."""
MAX_PIXELS = 1 << 21
MAX_BUDGET = 10**9


class OutputFormat(StrEnum):
    """Encodings of a finished picture."""

    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


class Priority(StrEnum):
    """Queue classes; a worker claims higher ones first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _is_unset(value: Any) -> bool:
    """Whether a field is left out when it is written, for readers older than the field."""
    return not value


class PathChange(Message):
    """One departure from the path that a sampler takes by itself, made to keep a budget or a time, or under load."""

    evaluation: int = Field(ge=0, description="Network evaluations of this picture before it.")
    steps: int = Field(ge=0, le=MAX_STEPS, description="Steps that the rest takes; 0 = all patches leap to the end.")
    guided: bool = Field(True, description="False: without guidance from here on.")
    tolerance: float | None = Field(
        None,
        ge=0,
        le=MAX_TOLERANCE,
        exclude_if=lambda tolerance: tolerance is None,
        description="Tolerance of the adaptive sampler from here on; default: as before.",
    )


class GenerationRequest(Request):
    """A request for `n` pictures, the same over REST and gRPC.

    Exactly one of `prompt` and `class_label` is set; the model's kind says which. If `sampler`, `steps` or
    `guidance` is left out, the model's default is used. Picture *i* is drawn from seed `seed + i`.
    """

    model: str | None = Field(
        None,
        max_length=100,
        description="A name from GET /v1/models; default: the first model there that fits the prompt or class label.",
    )
    model_digest: Digest | None = Field(
        None,
        exclude_if=_is_unset,
        description="Draw with exactly this bundle: a `digest` from GET /v1/models. Default: any of the model's name.",
    )
    prompt: str | None = Field(None, min_length=1, max_length=MAX_PROMPT)
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT,
        exclude_if=_is_unset,
        description="For text models: what guidance leads away from, in place of the empty prompt.",
    )
    class_label: str | None = Field(None, min_length=1, max_length=200)
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    seed: int | None = Field(None, ge=0, le=MAX_SEED - MAX_IMAGES)
    quality: Quality | None = Field(
        None, strict=False, description="A preset of the adaptive sampler. Excludes `sampler`; `steps` is allowed."
    )
    sampler: Sampler | None = Field(None, description="An object with options, or the sampler's name.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=30, description="Classifier-free guidance scale; 1 = no guidance.")
    width: int | None = Field(
        None, ge=MIN_SIDE, le=MAX_SIDE, description="Requires `height`: bring the finished picture to this size."
    )
    height: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE)
    image: str | None = Field(
        None,
        min_length=1,
        description="A picture to edit: PNG, WebP or JPEG in base64. In a job, its SHA-256 instead.",
    )
    mask: str | None = Field(
        None,
        min_length=1,
        description="PNG or WebP in base64, as large as `image`. Fully transparent pixels may change, others are kept.",
    )
    strength: float | None = Field(
        None,
        ge=0.01,
        le=1,
        description="How much `image` may change; 1 = completely. Default: 1 with a mask, otherwise 0.6.",
    )
    fit: Fit | None = Field(
        None,
        strict=False,
        exclude_if=_is_unset,
        description="How pictures come to a size of another shape: `contain`, the default, adds bars, `cover` crops.",
    )
    output_format: OutputFormat = Field(OutputFormat.PNG, strict=False)
    output_compression: int = Field(90, ge=0, le=100, description="Quality of WebP and JPEG files.")
    previews: bool = Field(True, description="Stream one-step estimates while the picture is drawn.")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        exclude_if=_is_unset,
        description="Previews of each picture that are made however busy the server is, spread evenly.",
    )
    priority: Priority = Field(Priority.NORMAL, strict=False)
    deadline_seconds: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="Expire if not started by then. Among running jobs, the one with the nearest deadline goes first.",
    )
    finish_within_seconds: float | None = Field(
        None,
        gt=0,
        le=86400,
        exclude_if=_is_unset,
        description="Finish by then, as well as that allows. Counts from acceptance. Refused with 503 if it cannot be.",
    )
    degrade: bool | None = Field(
        None,
        exclude_if=lambda may: may is not False,
        description="False: load must not lower the quality. Load never does if `sampler`, `steps` or `path` is given.",
    )
    budget: int | None = Field(
        None,
        ge=1,
        le=MAX_BUDGET,
        exclude_if=_is_unset,
        description="Patch evaluations that each picture takes at most, guidance branches included.",
    )
    budget_share: float | None = Field(
        None,
        gt=0,
        le=1,
        exclude_if=_is_unset,
        description="The same, as a share of what the model's own choice takes on average. Excludes `budget`.",
    )
    path: list[PathChange] | None = Field(
        None,
        max_length=MAX_STEPS,
        exclude_if=_is_unset,
        description="The `path` of a picture's report: with its seed and sampler, it repeats that picture bit for bit.",
    )
    deterministic: bool = Field(
        False,
        description="Share no evaluation with others: slower, but repeats bit by bit on the same kind of worker.",
    )
    metadata: bool = Field(
        True,
        exclude_if=lambda on: on,  # a request without the field reads the same to every version
        description="Write into the picture's file how it was made: prompt, seed, model and settings.",
    )

    @property
    def asked_size(self) -> Size | None:
        """Width and height of the finished picture; None: the model's own."""
        return (self.width, self.height) if self.width and self.height else None

    @field_validator("sampler", mode="before")
    @classmethod
    def _sampler_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("prompt", "negative_prompt", "class_label")  # a model's name needs no check: it is only looked up
    @classmethod
    def _text_is_clean(cls, value: str | None) -> str | None:
        if value is not None:
            if "\x00" in value:
                raise ValueError("must not contain NUL")
            value.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return value

    @field_validator("negative_prompt", "partial_images", "path")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

    @model_validator(mode="after")
    def _fields_go_together(self) -> GenerationRequest:
        if (self.prompt is None) == (self.class_label is None):
            raise field_error("prompt", "give exactly one of prompt and class_label")
        if self.quality is not None and self.sampler is not None:
            raise field_error("quality", "cannot be combined with sampler: give one of the two")
        if (self.width is None) != (self.height is None):
            raise field_error("height" if self.height is None else "width", "give width and height together")
        if self.width and self.height and self.width * self.height > MAX_PIXELS:
            raise field_error("height", f"width times height must be at most {MAX_PIXELS}")
        if self.negative_prompt and self.prompt is None:
            raise field_error("negative_prompt", "requires a prompt: models of classes have no negative prompt")
        if self.budget is not None and self.budget_share is not None:
            raise field_error("budget_share", "cannot be combined with budget: give one of the two")
        if self.path:
            if self.budget or self.budget_share:
                raise field_error("path", "cannot be combined with a budget: it is what a budget led to")
            if self.n != 1:
                raise field_error("path", "requires n = 1: it is the path of one picture")
        if self.finish_within_seconds is not None:
            for name, given in (
                ("path", self.path),
                ("degrade", self.degrade is False),
                ("deterministic", self.deterministic),
            ):
                if given:
                    raise field_error(name, "cannot be combined with finish_within_seconds, which may change the path")
        if self.partial_images and not self.previews:
            raise field_error("partial_images", "requires previews")
        for name in ("mask", "strength"):
            if getattr(self, name) is not None and self.image is None:
                raise field_error(name, "requires image")
        return self


class ModelCard(Message):
    """What a worker announces about a bundle, and gateways show under `GET /v1/models`."""

    name: str
    kind: Literal["class", "text"]
    width: int
    height: int
    grid: tuple[int, int] = Field(description="Patch rows and columns.")
    classes: list[str] = Field([])
    sampler: Sampler
    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance: float = Field(ge=0, le=30)
    licence: str
    created: int = Field(description="When the weights were made, in Unix seconds.")
    description: str = ""
    digest: str | None = Field(
        None, exclude_if=_is_unset, description="Of all the bundle's files, in hexadecimal: which bundle this is."
    )
    weights_sha256: str | None = Field(
        None, exclude_if=lambda digest: digest is None, description="Of the weights file, in hexadecimal."
    )
    usual_patch_evaluations: int | None = Field(
        None, exclude_if=_is_unset, description="What a picture of the model's own choice takes on average."
    )
    usual_seconds: float | None = Field(
        None, exclude_if=_is_unset, description="Seconds that such a picture takes while nothing else runs."
    )
    least_seconds: float | None = Field(
        None,
        exclude_if=_is_unset,
        description="Seconds of a picture at the lowest quality, with what waits now.",
    )
    least_seconds_more: float | None = Field(
        None,
        exclude_if=_is_unset,
        description="Seconds that each further picture of a request adds at least: they share evaluations.",
    )
    examples: list[str] = Field(
        [], exclude_if=lambda prompts: not prompts, description="Prompts that show what the model can draw."
    )
    sizes: list[Annotated[Size, Field(strict=False)]] = Field(
        [],
        exclude_if=_is_unset,
        description="Further sizes that it draws itself, `[width, height]` each; all others are resampled.",
    )

    @field_validator("grid", mode="before")
    @classmethod
    def _grid_from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def size(self) -> Size:
        """The model's own width and height, in pixels."""
        return self.width, self.height

    def drawn_grid(self, request: GenerationRequest) -> tuple[int, int]:
        """Patch rows and columns of a picture that a worker draws for a request."""
        width, height = nearest_native([self.size, *self.sizes], request.asked_size or self.size)
        return self.grid[0] * height // self.height, self.grid[1] * width // self.width


class JobStatus(StrEnum):
    """States of a job. The last four are terminal: each job reaches exactly one of them."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self not in (JobStatus.WAITING, JobStatus.RUNNING)


class ImageReport(Message):
    """What one picture cost. Lists of patches are row-major over the picture's grid."""

    seed: int
    patch_evaluations: int = Field(description="Patch forward passes made, guidance branches included.")
    dense_patch_evaluations: int = Field(description="What a dense run of the same sampler would have made.")
    difficulty: list[float] = Field(description="Last predicted variance of each patch.")
    finished_at: list[int] = Field(description="Network evaluation after which each patch was at t = 1.")
    path: list[PathChange] = Field(
        [], exclude_if=_is_unset, description="How a budget changed the path; a request with it repeats the picture."
    )
    landing_error: float | None = Field(
        None,
        exclude_if=_is_unset,
        description="If the picture was ended early: predicted error, in standard deviations of the latents.",
    )
    predicted_error: float | None = Field(
        None,
        exclude_if=lambda error: error is None,
        description="If the path was changed: predicted error of all patches that leapt to the end, in the same units.",
    )
    asked_patch_evaluations: int | None = Field(
        None, exclude_if=_is_unset, description="If the path was changed: what the path asked for was expected to take."
    )


class SavingsReport(Message):
    """Work done and saved by a whole request: savings_ratio = 1 − done / dense."""

    patches: int
    grid_rows: int
    grid_columns: int
    patch_evaluations: int
    dense_patch_evaluations: int
    savings_ratio: float
    queue_seconds: float
    duration_seconds: float
    time_to_first_preview_seconds: float | None
    prompt_truncated: bool = Field(False, description="The prompt had more tokens than the model can read.")
    prompt_tokens: int = Field(0, description="Tokens of the prompt that the model read.")
    negative_prompt_truncated: bool = Field(
        False, exclude_if=_is_unset, description="So had the negative prompt; left out if not."
    )
    lowered_by: Literal["load", "time"] | None = Field(
        None,
        exclude_if=_is_unset,
        description="What lowered the quality: load, or a `finish_within_seconds` that was too short even alone.",
    )
    finished_in_time: bool | None = Field(
        None,
        exclude_if=lambda met: met is None,
        description="Whether `finish_within_seconds` was kept.",
    )
    model_digest: str | None = Field(
        None, exclude_if=_is_unset, description="The `digest` of the bundle that drew the pictures."
    )
    images: list[ImageReport]


class JobError(Message):
    """Why a job did not complete."""

    code: str
    message: str


class Job(Message):
    """A job as stored and shown. All defaults of `request` are filled in, including the seed."""

    id: str
    status: JobStatus = Field(strict=False)
    request: GenerationRequest
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    error: JobError | None = None
    report: SavingsReport | None = None
    tenant: SkipJsonSchema[str | None] = Field(None, exclude=True)
    """Name of the API key that submitted it. Only for the gateway; None if no key is required."""
    trace: SkipJsonSchema[dict[str, str]] = Field({}, exclude=True)
    """W3C trace context of the call that submitted it, for workers' spans; empty if it was not traced."""
    degradable: SkipJsonSchema[bool] = Field(False, exclude=True)
    """Whether load may lower its quality: nothing in the request fixes that. Only for workers."""
    quiet: SkipJsonSchema[bool] = Field(False, exclude=True)
    """Whether nobody waits for more than its end. Only for workers."""
    claimed_at: SkipJsonSchema[float | None] = Field(None, exclude=True)
    """When its present worker took it. Unlike `started_at`, this is not the first time. Only for workers."""
    unreadable: SkipJsonSchema[str | None] = Field(None, exclude=True)
    """Why this process cannot read the whole record, which another version wrote. The unread parts are placeholders."""

"""Requests, jobs and reports: what travels between clients, gateway, queue and worker; free of torch and of Redis."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from service.messages import Message, field_error
from service.sampler_options import MAX_STEPS, Quality, Sampler

MAX_IMAGES = 10
MAX_PROMPT = 2000
MAX_SEED = 2**63 - 1
MIN_SIDE, MAX_SIDE = 16, 2048
MAX_PIXELS = 1 << 21


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


class GenerationRequest(Message):
    """One request for ``n`` pictures, the same over REST and gRPC.

    Exactly one of ``prompt`` and ``class_label`` is set, as the model's kind demands. ``sampler``, ``steps``
    and ``guidance`` left out take the model's defaults; picture *i* is drawn from seed ``seed + i``.
    """

    model: str | None = Field(None, max_length=100, description="A name from GET /v1/models; default: the first.")
    prompt: str | None = Field(None, min_length=1, max_length=MAX_PROMPT)
    class_label: str | None = Field(None, min_length=1, max_length=200)
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    seed: int | None = Field(None, ge=0, le=MAX_SEED - MAX_IMAGES)
    quality: Quality | None = Field(
        None, strict=False, description="A preset of the adaptive sampler, instead of `sampler`; `steps` still counts."
    )
    sampler: Sampler | None = Field(None, description="An object, or just the sampler's name.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=30, description="Classifier-free guidance; 1 switches it off.")
    width: int | None = Field(
        None, ge=MIN_SIDE, le=MAX_SIDE, description="With `height`: the finished picture is resampled to this size."
    )
    height: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE)
    image: str | None = Field(
        None,
        min_length=1,
        description="A picture to start from, PNG, WebP or JPEG in base64; a job shows its SHA-256 instead.",
    )
    mask: str | None = Field(
        None,
        min_length=1,
        description="Of the same size, PNG or WebP in base64: what is fully transparent may change, all else is kept.",
    )
    strength: float | None = Field(
        None, ge=0.01, le=1, description="How far `image` may change: 1, the default with a mask, is all; else 0.6."
    )
    output_format: OutputFormat = Field(OutputFormat.PNG, strict=False)
    output_compression: int = Field(90, ge=0, le=100, description="Quality of webp and jpeg.")
    previews: bool = Field(True, description="Stream one-step estimates while the picture is made.")
    priority: Priority = Field(Priority.NORMAL, strict=False)
    deadline_seconds: float | None = Field(
        None, gt=0, le=86400, description="Expire if not started by then; once started, the nearest one comes first."
    )
    deterministic: bool = Field(
        False,
        description="Never share an evaluation: slower, but bit-equal whenever repeated on the same kind of worker.",
    )

    @field_validator("sampler", mode="before")
    @classmethod
    def _sampler_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("prompt", "class_label")  # a model's name is only ever looked up
    @classmethod
    def _text_is_clean(cls, value: str | None) -> str | None:
        if value is not None:
            if "\x00" in value:
                raise ValueError("must not contain NUL")
            value.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return value

    @model_validator(mode="after")
    def _fields_go_together(self) -> GenerationRequest:
        if (self.prompt is None) == (self.class_label is None):
            raise field_error("prompt", "give exactly one of prompt and class_label")
        if self.quality is not None and self.sampler is not None:
            raise field_error("quality", "is a choice of sampler: give one of the two")
        if (self.width is None) != (self.height is None):
            raise field_error("height" if self.height is None else "width", "give width and height together")
        if self.width and self.height and self.width * self.height > MAX_PIXELS:
            raise field_error("height", f"width times height must be at most {MAX_PIXELS}")
        for name in ("mask", "strength"):
            if getattr(self, name) is not None and self.image is None:
                raise field_error(name, "is of use only with image")
        return self


class ModelCard(Message):
    """What a worker announces of a bundle and gateways show under ``GET /v1/models``."""

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
    created: int = Field(description="Unix seconds the weights were made.")
    description: str = ""

    @field_validator("grid", mode="before")
    @classmethod
    def _grid_from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class JobStatus(StrEnum):
    """Life of a job; the last four are terminal, and exactly one of them is ever reached."""

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
    """What one picture cost. Patch lists are row-major over the model's grid."""

    seed: int
    patch_evaluations: int = Field(description="Patch forward passes done, guidance branches included.")
    dense_patch_evaluations: int = Field(description="What a dense run of the same sampler would have done.")
    difficulty: list[float] = Field(description="Last predicted variance of each patch.")
    finished_at: list[int] = Field(description="Network evaluation after which each patch stood at t = 1.")


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
    prompt_truncated: bool = Field(False, description="The prompt had more tokens than the model reads.")
    prompt_tokens: int = Field(0, description="Tokens of the prompt that the model read.")
    images: list[ImageReport]


class JobError(Message):
    """Why a job did not complete."""

    code: str
    message: str


class Job(Message):
    """A job as stored and shown. ``request`` has every default filled in, the seed included."""

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
    """Name of the API key that submitted it, for the gateway's eyes only; None if it asked for none."""
    trace: SkipJsonSchema[dict[str, str]] = Field({}, exclude=True)
    """The W3C trace context of the call that submitted it, for workers' spans; empty if it was not traced."""

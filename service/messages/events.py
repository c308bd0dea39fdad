"""What happens to a job, as its watchers see it: first `Queued`, last exactly one of `TERMINAL_EVENTS`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from patchforge.service.messages.base import Message
from patchforge.service.messages.schemas import JobError, SavingsReport


class Queued(Message):
    """First event of every job."""

    type: Literal["queued"] = "queued"


class Started(Message):
    """A worker started the job. Repeated with a higher `attempt` if that worker stops responding."""

    type: Literal["started"] = "started"
    attempt: int
    steps: int = Field(description="Network evaluations of a dense run, guidance branches not counted.")


class Preview(Message):
    """A one-step estimate of picture `index`: `x_t + (1 − t)·v`, decoded."""

    type: Literal["preview"] = "preview"
    index: int
    evaluation: int = Field(description="Network evaluations this picture has had so far.")
    evaluations: int = Field(description="Network evaluations it will need in total.")
    times: list[float] = Field(description="Timestep of each patch, row-major; 1 = finished.")
    finished_share: float
    patch_evaluations: int
    dense_patch_evaluations: int = Field(description="What a dense run would have made by now.")
    b64_png: str
    grid: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        exclude_if=lambda grid: grid is None,
        description="Patch rows and columns of the picture; left out if they are the model's own.",
    )


class PatchesFinished(Message):
    """Patches of picture `index` that its latest evaluation brought to t = 1. They will not change again."""

    type: Literal["patches"] = "patches"
    index: int
    evaluation: int = Field(description="Network evaluations this picture has had so far.")
    evaluations: int = Field(description="Network evaluations it will need in total.")
    patches: list[int] = Field(description="Indices, row-major over the picture's grid.")
    times: list[float] = Field(description="Timestep of each of them before that evaluation.")
    finished_share: float = Field(description="Share of all patches of the picture that are finished.")
    grid: list[int] | None = Field(
        None,
        min_length=2,
        max_length=2,
        exclude_if=lambda grid: grid is None,
        description="Patch rows and columns of the picture; left out if they are the model's own.",
    )


class ImageReady(Message):
    """Picture `index` is finished and can be fetched."""

    type: Literal["image"] = "image"
    index: int


class Completed(Message):
    """Terminal: all pictures are finished."""

    type: Literal["completed"] = "completed"
    report: SavingsReport


class Failed(Message):
    """Terminal: the job failed, or was given up after too many attempts."""

    type: Literal["failed"] = "failed"
    error: JobError


class Cancelled(Message):
    """Terminal: a caller cancelled the job, or disconnected from a call that was waiting for it."""

    type: Literal["cancelled"] = "cancelled"


class Expired(Message):
    """Terminal: the deadline passed before a worker could start."""

    type: Literal["expired"] = "expired"


Event = Annotated[
    Queued | Started | PatchesFinished | Preview | ImageReady | Completed | Failed | Cancelled | Expired,
    Field(discriminator="type"),
]
TERMINAL_EVENTS = (Completed, Failed, Cancelled, Expired)

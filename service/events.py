"""What happens to a job, as its watchers see it: first `Queued`, last exactly one of `TERMINAL_EVENTS`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.messages import Message
from service.schemas import JobError, SavingsReport


class Queued(Message):
    """First event of every job."""

    type: Literal["queued"] = "queued"


class Started(Message):
    """A worker took the job; repeated with a higher ``attempt`` if an earlier worker died."""

    type: Literal["started"] = "started"
    attempt: int
    steps: int = Field(description="Network evaluations a dense run makes, guidance branches not counted.")


class Preview(Message):
    """A one-step estimate of picture ``index``: ``x_t + (1 − t)·v``, decoded."""

    type: Literal["preview"] = "preview"
    index: int
    evaluation: int = Field(description="Network evaluations this picture has had so far.")
    evaluations: int = Field(description="Network evaluations it will need in all.")
    times: list[float] = Field(description="Timestep of each patch, row-major; 1 is finished.")
    finished_share: float
    patch_evaluations: int
    dense_patch_evaluations: int = Field(description="What a dense run would have done by now.")
    b64_png: str


class PatchesFinished(Message):
    """Patches of picture ``index`` that reached t = 1 with its latest evaluation: they will not change again."""

    type: Literal["patches"] = "patches"
    index: int
    evaluation: int = Field(description="Network evaluations this picture has had so far.")
    evaluations: int = Field(description="Network evaluations it will need in all.")
    patches: list[int] = Field(description="Row-major over the model's grid.")
    times: list[float] = Field(description="Timestep each of them stood at before.")
    finished_share: float = Field(description="Of all patches of the picture.")


class ImageReady(Message):
    """Picture ``index`` is finished and can be fetched."""

    type: Literal["image"] = "image"
    index: int


class Completed(Message):
    """Terminal: all pictures are there."""

    type: Literal["completed"] = "completed"
    report: SavingsReport


class Failed(Message):
    """Terminal: the job failed, or was given up after too many attempts."""

    type: Literal["failed"] = "failed"
    error: JobError


class Cancelled(Message):
    """Terminal: a caller cancelled the job, or left a call that was waiting on it."""

    type: Literal["cancelled"] = "cancelled"


class Expired(Message):
    """Terminal: the deadline passed before a worker could start."""

    type: Literal["expired"] = "expired"


Event = Annotated[
    Queued | Started | PatchesFinished | Preview | ImageReady | Completed | Failed | Cancelled | Expired,
    Field(discriminator="type"),
]
TERMINAL_EVENTS = (Completed, Failed, Cancelled, Expired)

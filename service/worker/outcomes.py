"""Results of engine steps, for the worker to publish."""

from __future__ import annotations

from dataclasses import dataclass

from patchforge.service.messages.events import PatchesFinished, Preview
from patchforge.service.messages.schemas import JobError, SavingsReport


@dataclass(frozen=True)
class PatchesMade:
    """Patches that are finished and will not be evaluated again."""

    job_id: str
    finished: PatchesFinished


@dataclass(frozen=True)
class PreviewMade:
    """A preview to publish."""

    job_id: str
    preview: Preview


@dataclass(frozen=True)
class PictureMade:
    """A finished picture to store."""

    job_id: str
    index: int
    data: bytes


@dataclass(frozen=True)
class JobDone:
    """All pictures of a job are finished."""

    job_id: str
    report: SavingsReport


@dataclass(frozen=True)
class JobBroken:
    """A job cannot continue; other jobs are not affected."""

    job_id: str
    error: JobError


Outcome = PatchesMade | PreviewMade | PictureMade | JobDone | JobBroken

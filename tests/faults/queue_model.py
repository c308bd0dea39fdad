"""What the queue promises, in plain Python: the model-based test compares the real queue with this."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

from patchforge.service.queue import Claim

LEVELS = ("returned", "high", "normal", "low")
ENDINGS = {"completed", "failed", "cancelled", "expired"}


class Broken(AssertionError):
    """The queue did something that the model does not allow."""


def require(holds: object, what: str) -> None:
    """Raises Broken unless `holds` is true."""
    if not holds:
        raise Broken(what)


@dataclass
class Job:
    """An accepted request. While it runs, `holder` is its only valid claim."""

    id: str
    model: str
    level: str
    deadline: bool
    special: bool = False
    """Only some workers can run it."""
    room: int = 0
    """Bytes that are reserved for it until it ends."""
    status: str = "waiting"
    attempt: int = 0
    holder: Claim | None = None
    cancel: bool = False
    overdue: bool = False
    idle: bool = False
    events: list[str] = field(default_factory=lambda: ["queued"])
    pictures: set[int] = field(default_factory=set)
    collected: bool = False
    """Its batch has seen it end: nobody watches, and its events are gone."""

    @property
    def ended(self) -> bool:
        return self.status in ENDINGS


class Model:
    """All jobs, in queue order. Each method is one atomic step of the queue."""

    def __init__(self, cap: int, max_attempts: int, memory: float) -> None:
        """`memory`: bytes that may be reserved for all jobs."""
        self.cap, self.max_attempts, self.memory = cap, max_attempts, memory
        self.jobs: dict[str, Job] = {}
        self.lines: list[Job] = []  # waiting jobs, oldest first
        self.keys: dict[str, tuple[str, str]] = {}  # idempotency key: fingerprint, job id
        self.ended_unasked: list[tuple[str, str]] = []  # (job id, status) of this step

    def begin_step(self) -> None:
        """Expires jobs past their deadline, before every command."""
        self.ended_unasked = []
        for job in [job for job in self.lines if job.overdue]:
            self._end_unasked(job, "expired")

    def submit_outcome(self, key: str | None, fingerprint: str, room: int) -> tuple[str, str | None]:
        """Returns what a submit must answer: conflict, same (with the job's id), full, crowded or new."""
        known, first = self.keys.get(key, (fingerprint, None)) if key else (fingerprint, None)
        if known != fingerprint:
            return "conflict", None
        if first in self.jobs:
            return "same", first
        if len(self.lines) >= self.cap:
            return "full", None
        return ("crowded" if sum(self.reserved().values()) + room > self.memory else "new"), None

    def reserved(self) -> dict[str, int]:
        """Returns the id of each job that has not ended → its room, if it has any."""
        return {job.id: job.room for job in self.jobs.values() if job.room and not job.ended}

    def accept(self, job: Job, key: str | None, fingerprint: str) -> None:
        require(job.id not in self.jobs, "a new job has a new id")
        self.jobs[job.id] = job
        self.lines.append(job)
        if key:
            self.keys[key] = fingerprint, job.id

    def next_up(self, models: list[str], able: bool) -> set[str]:
        """Returns the jobs that a claim may take: the first job of each model, in the most urgent level that has any.

        Workers that can run special jobs take those of a level last.
        """
        for level, special in product(LEVELS, (False, True) if able else (False,)):
            line = [job for job in self.lines if (job.level, job.special) == (level, special) and job.model in models]
            if line:
                return {next(job.id for job in line if job.model == model) for model in {job.model for job in line}}
        return set()

    def start(self, claim: Claim) -> None:
        """Moves a job from its queue, or from its silent holder, to a new holder."""
        job = self.jobs[claim.job.id]
        if job in self.lines:
            self.lines.remove(job)
        job.status, job.holder, job.idle = "running", claim, False
        job.attempt += 1
        require(claim.attempt == job.attempt == claim.job.attempt, "attempts are counted right")

    def silent(self, job: Job, models: list[str]) -> bool:
        return job.status == "running" and job.idle and job.model in models

    def over(self, job: Job) -> bool:
        """Tells whether a silent holder's job ends instead of running again. Any worker may end it."""
        return job.cancel or job.attempt >= self.max_attempts

    def end_by_reclaim(self, job_id: str, models: list[str]) -> None:
        """Ends the job of a silent holder if it should be cancelled or has no attempts left."""
        job = self.jobs[job_id]
        require(self.silent(job, models), "only a silent worker's job ends by reclaim")
        require(self.over(job), "a job that may run again does not end")
        self._end_unasked(job, "cancelled" if job.cancel else "failed")

    def restart(self, claim: Claim, models: list[str], able: bool) -> None:
        job = self.jobs[claim.job.id]
        require(self.silent(job, models), "only a silent worker's job is taken over")
        require(able or not job.special, "only a worker that can run it takes it over")
        require(not self.over(job), "a job to be ended is not run again")
        self.start(claim)

    def nothing_to_reclaim(self, models: list[str], able: bool) -> None:
        silent = [job for job in self.jobs.values() if self.silent(job, models)]
        left = [job for job in silent if self.over(job) or able or not job.special]
        require(not left, "a silent job was left")

    def owned(self, claim: Claim) -> Job | None:
        """Returns the job if the claim is still valid."""
        job = self.jobs.get(claim.job.id)
        return job if job is not None and job.status == "running" and job.holder is claim else None

    def cancel(self, job_id: str) -> None:
        job = self.jobs.get(job_id)
        if job is not None and job.status == "waiting":
            self._end_unasked(job, "cancelled")
        elif job is not None and job.status == "running":
            job.cancel = True

    def finish(self, owned: Job | None, status: str) -> bool:
        if owned is not None:
            self._end(owned, status)
        return owned is not None

    def release(self, owned: Job | None) -> bool:
        """Puts the job first in the queue, as if it had not started. Its deadline was met."""
        if owned is None:
            return False
        if owned.cancel:
            self._end_unasked(owned, "cancelled")
            return True
        owned.status, owned.holder, owned.idle, owned.level, owned.deadline = "waiting", None, False, "returned", False
        owned.attempt -= 1
        self.lines.append(owned)
        return True

    def forget_all(self) -> None:
        """Someone emptied the server."""
        self.jobs.clear()
        self.lines.clear()
        self.keys.clear()

    def _end_unasked(self, job: Job, status: str) -> None:
        self._end(job, status)
        self.ended_unasked.append((job.id, status))

    def _end(self, job: Job, status: str) -> None:
        require(not job.ended, "a job ends once")
        if job in self.lines:
            self.lines.remove(job)
        job.status, job.holder, job.idle = status, None, False
        job.events.append(status)

"""What the queue promises, as plain Python: the reference its model-based test compares the real one with."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.queue import Claim

LEVELS = ("returned", "high", "normal", "low")
ENDINGS = {"completed", "failed", "cancelled", "expired"}


class Broken(AssertionError):
    """The queue did what the model does not allow."""


def require(holds: object, what: str) -> None:
    """Raises Broken unless ``holds``."""
    if not holds:
        raise Broken(what)


@dataclass
class Job:
    """One accepted request; ``holder`` is the one claim that may speak for it, while it runs."""

    id: str
    model: str
    level: str
    deadline: bool
    status: str = "waiting"
    attempt: int = 0
    holder: Claim | None = None
    cancel: bool = False
    overdue: bool = False
    idle: bool = False
    events: list[str] = field(default_factory=lambda: ["queued"])
    pictures: set[int] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        return self.status in ENDINGS


class Model:
    """All jobs, in the order they joined their lines; each method is one atomic step of the queue."""

    def __init__(self, cap: int, max_attempts: int) -> None:
        self.cap, self.max_attempts = cap, max_attempts
        self.jobs: dict[str, Job] = {}
        self.lines: list[Job] = []  # waiting jobs, oldest first
        self.keys: dict[str, tuple[str, str]] = {}  # idempotency key: fingerprint, job id
        self.ended_unasked: list[tuple[str, str]] = []  # (job id, status) of this step

    def begin_step(self) -> None:
        """Whatever the command, jobs past their deadline expire first."""
        self.ended_unasked = []
        for job in [job for job in self.lines if job.overdue]:
            self._end_unasked(job, "expired")

    def submit_outcome(self, key: str | None, fingerprint: str) -> tuple[str, str | None]:
        """What a submit must answer: conflict, same (with the job's id), full or new."""
        known, first = self.keys.get(key, (fingerprint, None)) if key else (fingerprint, None)
        if known != fingerprint:
            return "conflict", None
        if first in self.jobs:
            return "same", first
        return ("full" if len(self.lines) >= self.cap else "new"), None

    def accept(self, job: Job, key: str | None, fingerprint: str) -> None:
        require(job.id not in self.jobs, "a new job has a new id")
        self.jobs[job.id] = job
        self.lines.append(job)
        if key:
            self.keys[key] = fingerprint, job.id

    def next_up(self, models: list[str]) -> set[str]:
        """Jobs a claim may take: of the most urgent level that has any, the first of each model."""
        for level in LEVELS:
            line = [job for job in self.lines if job.level == level and job.model in models]
            if line:
                return {next(job.id for job in line if job.model == model) for model in {job.model for job in line}}
        return set()

    def start(self, claim: Claim) -> None:
        """A job leaves its line, or its silent holder, for a new holder."""
        job = self.jobs[claim.job.id]
        if job in self.lines:
            self.lines.remove(job)
        job.status, job.holder, job.idle = "running", claim, False
        job.attempt += 1
        require(claim.attempt == job.attempt == claim.job.attempt, "attempts are counted right")

    def reclaimable(self, job: Job, models: list[str]) -> bool:
        return job.status == "running" and job.idle and job.model in models

    def end_by_reclaim(self, job_id: str, models: list[str]) -> None:
        """A silent holder's job ends if it was to be cancelled, or is out of attempts."""
        job = self.jobs[job_id]
        require(self.reclaimable(job, models), "only a silent worker's job ends by reclaim")
        require(job.cancel or job.attempt >= self.max_attempts, "a job that may run again does not end")
        self._end_unasked(job, "cancelled" if job.cancel else "failed")

    def restart(self, claim: Claim, models: list[str]) -> None:
        job = self.jobs[claim.job.id]
        require(self.reclaimable(job, models), "only a silent worker's job is taken over")
        require(not job.cancel and job.attempt < self.max_attempts, "a job to be ended is not run again")
        self.start(claim)

    def nothing_to_reclaim(self, models: list[str]) -> None:
        require(not [job for job in self.jobs.values() if self.reclaimable(job, models)], "a silent job was left")

    def owned(self, claim: Claim) -> Job | None:
        """The job, if the claim still speaks for it."""
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
        """Back in line, first of all, as if it had not been started; its deadline was met."""
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

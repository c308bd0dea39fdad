"""Batches: files whose lines come into the queue one by one, fed by gateways that may know old news."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from patchforge.service.errors import NoRoom, NotReady, QueueFull, ResultsUnavailable
from patchforge.service.messages.schemas import Priority
from patchforge.service.queue import keys
from patchforge.service.queue.batch_records import StoredBatch
from patchforge.service.queue.connection import BATCH_LINE_BYTES
from patchforge.service.queue.job_queue import FeedOutcome
from tests.faults.fleet_machine import FleetMachine
from tests.faults.queue_model import Job, require
from tests.faults.queue_rig import BATCH_IN_FLIGHT, CAP, MEMORY, Rig
from tests.service.queue.kit import DONE, a_request

MOST_BATCHES = 2
OF_BATCHES = 0.75  # share of the memory
BATCHES = st.integers(0, MOST_BATCHES - 1)
NAMES = st.sampled_from(["one", "two", "three", "four"])

with_batches = precondition(lambda self: self.batches)


@dataclass
class Batch:
    """A batch, as it must be. A line that is settled is in `outcomes`, with `flying` while its job may run."""

    id: str
    key: str
    length: int
    next: int = 0
    status: str = "in_progress"
    ending: str | None = None
    outcomes: dict[int, str] = field(default_factory=dict)
    flying: dict[int, str] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    job_of: dict[int, str] = field(default_factory=dict)
    moved_whole: set[int] = field(default_factory=set)
    """Lines whose job still had its record when they moved."""
    names: set[str] = field(default_factory=set)
    completed: int = 0
    failed: int = 0
    archived: int = 0
    """What became of the lines before this one is in the object store."""
    seen: list[StoredBatch] = field(default_factory=list)
    """What gateways once read of it."""

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "cancelled")

    def may_settle(self, line: int) -> bool:
        return self.status == "in_progress" and self.ending is None and line == self.next

    def settle(self, name: str, outcome: str | None) -> None:
        if outcome is not None:
            self.outcomes[self.next] = outcome
        self.names.add(name)
        self.next += 1


class BatchMachine(FleetMachine):
    """Adds the calls about batches."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.batches: list[Batch] = []

    def forget_all(self) -> None:
        super().forget_all()
        self.batches.clear()

    def jobs_of_batches(self) -> set[str]:
        return {job_id for batch in self.batches for job_id in batch.flying.values()}

    @property
    def crowded(self) -> bool:
        """Whether the jobs have reserved what batches may use. What batches reserve themselves is nothing beside it."""
        return sum(self.model.reserved().values()) >= OF_BATCHES * MEMORY

    def also_reserved(self) -> dict[str, int]:
        going = [batch for batch in self.batches if not batch.ended]
        return {keys.BATCH + batch.key: BATCH_LINE_BYTES * batch.length for batch in going}

    def a_batch(self, which: int) -> Batch:
        return self.batches[which % len(self.batches)]

    @precondition(lambda self: len(self.batches) < MOST_BATCHES)
    @rule(length=st.integers(1, 3), away=st.sampled_from([False, False, False, True]))
    def begin_batch(self, length: int, away: bool) -> None:
        """Of a file that is sent first. The object store may be away then."""
        gateway, self.rig.objects.away = self.rig.gateway, away
        file = self.ask(gateway.add_file([b"{}"] * length, "lines.jsonl", None, 3600))
        self.rig.objects.away = False
        self.check_ended()
        refused = NoRoom if self.crowded else ResultsUnavailable if away else None
        require(file is refused or refused is None, f"a file was answered with {file}, expected {refused}")
        if refused is not None:
            self.rig.tally[f"file: {refused.__name__}"] += 1
            return
        made = self.call(gateway.create_batch(file.id, None, endpoint=None, window="24h", metadata=None))
        self.check_ended()
        self.batches.append(Batch(made.id, made.id.removeprefix("batch_"), length))

    @with_batches
    @rule(which=BATCHES, late=st.booleans(), name=NAMES, model=st.sampled_from("ab"))
    def feed(self, which: int, late: bool, name: str, model: str) -> None:
        """A gateway queues a line. One that is late believes what was true before."""
        batch = self.a_batch(which)
        if (stored := self.read_batch(batch, late)) is None:
            return
        request = a_request(model=model, priority=Priority.LOW)
        fed = self.rig.gateway.feed_line(stored, name, {"custom_id": name}, request, source=None, needs=())
        answer = self.ask(fed)
        self.check_ended()
        require(answer is self.feed_outcome(batch, stored.next, name), f"feeding a line was answered with {answer}")
        self.rig.tally[f"feed: {answer}"] += 1
        if answer is FeedOutcome.QUEUED:
            job_id = self.rig.client.hget(keys.BATCH_FLYING + batch.key, str(stored.next)).decode()
            self.model.accept(Job(job_id, model, "low", deadline=False), None, "")
            self.jobs.append(job_id)
            batch.flying[batch.next] = batch.job_of[batch.next] = job_id
            batch.jobs.append(job_id)
            batch.settle(name, "flying")

    def feed_outcome(self, batch: Batch, line: int, name: str) -> Any:
        if not batch.may_settle(line):
            return FeedOutcome.STALE
        if name in batch.names:
            return FeedOutcome.DUPLICATE
        if len(self.jobs_of_batches()) >= BATCH_IN_FLIGHT * max(1, len(self.served)):
            return FeedOutcome.ENOUGH
        if len(self.model.lines) >= CAP // 2:
            return QueueFull
        return NoRoom if self.crowded else FeedOutcome.QUEUED

    @with_batches
    @rule(which=BATCHES, late=st.booleans(), name=NAMES, refused=st.booleans())
    def settle(self, which: int, late: bool, name: str, refused: bool) -> None:
        """A gateway refuses a line, or passes over an empty one."""
        batch = self.a_batch(which)
        if (stored := self.read_batch(batch, late)) is None:
            return
        done = self.call(
            self.rig.gateway.settle_line(batch.key, stored.next, name, {"status": 422} if refused else None)
        )
        self.check_ended()
        require(done == batch.may_settle(stored.next), "a line is settled once")
        if done:
            batch.settle(name, "refused" if refused else None)
            batch.failed += refused

    def read_batch(self, batch: Batch, late: bool) -> StoredBatch | None:
        """Returns what a gateway believes of a batch, if it would go on feeding it."""
        batch.seen.append(self.rig.run(self.rig.gateway.batch(batch.id, None)))
        stored = batch.seen[0 if late else -1]
        return stored if stored.feeding else None

    @with_batches
    @rule(which=BATCHES)
    def step(self, which: int) -> None:
        batch = self.a_batch(which)
        stored, outcomes = self.call(self.rig.gateway.step_batch(batch.key))
        expected = self.step_outcomes(batch)
        self.check_ended()
        require(sorted(outcomes) == sorted(expected), f"lines ended {outcomes}, expected {expected}")
        require(stored is not None and stored.batch.status == batch.status, "how the batch stands")
        counts = stored.batch.request_counts if stored else None
        require(counts and (counts.completed, counts.failed) == (batch.completed, batch.failed), "what is counted")
        self.check_batch(batch)
        self.rig.tally[f"batch: {batch.status}"] += 1

    @with_batches
    @rule(which=BATCHES, late=st.booleans(), away=st.booleans(), again=st.booleans())
    def move_results(self, which: int, late: bool, away: bool, again: bool) -> None:
        """A gateway moves what became of lines into the object store, which may be away. One may do so `again`."""
        batch = self.a_batch(which)
        batch.seen.append(self.rig.run(self.rig.gateway.batch(batch.id, None)))
        stored = batch.seen[0 if late else -1]
        if batch.ended and away:  # whether it notices depends on what it remembers of the lines
            return
        for _ in range(1 + again):
            self.call(self.rig.gateway.count_batches())  # a move may be no step of the queue; this one is
            self.check_ended()
            self.rig.objects.away = away
            answer = self.ask(self.rig.gateway.move_results(stored, lambda text: "unread"))
            self.rig.objects.away = False
            self.check_ended()
            expected = self.moved(batch, stored, away)
            require(answer is expected, f"moving results was answered with {answer}, expected {expected}")
        now = self.rig.run(self.rig.gateway.batch(batch.id, None))
        require(now.archived == batch.archived, f"moved up to {now.archived}, expected {batch.archived}")
        self.check_files(batch, now)

    # Without this one, nearly no batch would end: all its lines must be settled, and their results moved.
    @with_batches
    @rule(which=BATCHES, name=NAMES, away=st.booleans())
    def carry_on(self, which: int, name: str, away: bool) -> None:
        self.settle(which, late=False, name=name, refused=False)
        batch = self.a_batch(which)
        for claim in [claim for claim in self.claims if claim.job.id in batch.flying.values()]:
            done = self.call(self.rig.worker.finish(claim, DONE))
            require(done == self.model.finish(self.owned(claim), "completed"), "only the holder finishes, and once")
            self.check_ended()
        self.step(which)
        if away:  # at first
            self.move_results(which, late=False, away=True, again=False)
        self.move_results(which, late=False, away=False, again=False)
        self.step(which)

    def moved(self, batch: Batch, stored: StoredBatch, away: bool) -> type[Exception] | None:
        """Moves what must move. Returns what must be raised."""
        if stored.batch.ended:
            return None
        ending, first = stored.batch.status == "finalizing", stored.archived or 0
        most = stored.length if ending else min([stored.next, *batch.flying])
        while first < most:
            if away and (first in batch.outcomes or first >= stored.next):
                self.rig.tally["results: away"] += 1
                return ResultsUnavailable
            if first != batch.archived or batch.ended:
                self.rig.tally["results: late"] += 1
                return None
            if job := self.model.jobs.get(batch.job_of.get(first, "")):
                batch.moved_whole.add(first)
                job.cancel = False  # the record that is left does not say
            batch.archived += 1
            first += 1
            self.rig.tally["results moved"] += 1
        return None

    def check_files(self, batch: Batch, stored: StoredBatch) -> None:
        """Everything that is settled is in one of the two files, wherever it is."""
        found = {kind: self.rig.run(self.read_file(batch, stored, kind)) for kind in ("output", "error")}
        for kind, lines in found.items():
            expected = {
                line: outcome
                for line, outcome in batch.outcomes.items()
                if (outcome == "completed") == (kind == "output")
            }
            if kind == "error":
                expected |= dict.fromkeys(range(batch.next, batch.archived), "unsettled")
            require(lines == expected, f"{kind} has {lines}, expected {expected}")

    async def read_file(self, batch: Batch, stored: StoredBatch, kind: str) -> dict[int, str]:
        lines = {}
        async for line in self.rig.gateway.settled_lines(stored, kind):
            lines[line.number] = line.outcome
            if line.number in batch.moved_whole:
                require(line.job is not None and line.job.id == line.details["job"], "the job moved with its line")
        return lines

    def step_outcomes(self, batch: Batch) -> list[str]:
        if batch.status == "finalizing" and batch.archived == batch.length:
            batch.status = batch.ending or ""
        if batch.status not in ("in_progress", "cancelling"):
            return []
        outcomes = []
        for line, job_id in list(batch.flying.items()):
            if batch.ending:
                self.model.cancel(job_id)
            job = self.model.jobs.get(job_id)
            if job is not None and not job.ended:
                continue
            status = job.status if job is not None else "failed"
            outcome = status if status in ("completed", "cancelled") else "failed"
            outcomes.append(outcome)
            batch.outcomes[line] = outcome
            del batch.flying[line]
            batch.completed += outcome == "completed"
            batch.failed += outcome == "failed" or (outcome == "cancelled" and not batch.ending)
            if job is not None:
                job.collected = True
        if not batch.flying and (batch.ending or batch.next >= batch.length):
            batch.status, batch.ending = "finalizing", batch.ending or "completed"
        return outcomes

    @with_batches
    @rule(which=BATCHES)
    def cancel_batch(self, which: int) -> None:
        batch = self.a_batch(which)
        answer = self.call(self.rig.gateway.cancel_batch(batch.id, None))
        self.check_ended()
        if batch.status == "in_progress" and batch.ending is None:
            batch.status, batch.ending = "cancelling", "cancelled"
        require(answer.status == batch.status, "a cancel stops what has not ended")

    @with_batches
    @rule(which=BATCHES)
    def delete_batch(self, which: int) -> None:
        batch = self.a_batch(which)

        async def delete() -> Any:
            try:
                return await self.rig.gateway.delete_batch(batch.id, None)
            except NotReady:
                return NotReady

        answer = self.call(delete())
        self.check_ended()
        require((answer is NotReady) == (not batch.ended), "only what has ended is deleted")
        if batch.ended:
            self.batches.remove(batch)
            for job_id in batch.jobs:
                self.model.jobs.pop(job_id, None)
            left = [name for name in self.rig.objects.held if f"/batches/{batch.key}/" in name]
            require(not left, f"objects of a deleted batch: {left}")
            self.rig.tally["batches deleted"] += 1

    def check_batch(self, batch: Batch) -> None:
        found = self.rig.client.hgetall(keys.BATCH_RESULTS + batch.key)
        outcomes = {int(line): text.decode().partition(" ")[0] for line, text in found.items()}
        require(outcomes == batch.outcomes, f"lines are {outcomes}, expected {batch.outcomes}")
        flying = {
            int(line): job_id.decode()
            for line, job_id in self.rig.client.hgetall(keys.BATCH_FLYING + batch.key).items()
        }
        require(flying == batch.flying, "the jobs that are to be looked at")

"""Every call and accident of the queue, as rules that hypothesis mixes. Each rule compares the queue with its model.

To the queue a crashed worker and a paused one are alike: silent. A paused one speaks again, too late: here, any claim
ever given may act at any time. Time passes by ageing entries on the server, so nothing sleeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from patchforge.service.errors import (
    IdempotencyConflict,
    NoRoom,
    NotFound,
    NotReady,
    QueueFull,
    ResultsUnavailable,
    Unavailable,
)
from patchforge.service.messages.events import TERMINAL_EVENTS, Cancelled, Failed, Started
from patchforge.service.messages.schemas import Job as RealJob
from patchforge.service.messages.schemas import JobError, Priority
from patchforge.service.queue import keys
from patchforge.service.queue.claims import Claim, Heartbeat, claim_arguments
from patchforge.service.queue.records import EVENT
from tests.faults.queue_model import Job, Model, require
from tests.faults.queue_rig import CAP, MAX_ATTEMPTS, MEMORY, Rig
from tests.service.queue.kit import DONE, a_request, watched

T = TypeVar("T")

FAILED = Failed(error=JobError(code="nan", message="not a number"))
MODELS = st.sampled_from([["a"], ["b"], ["a", "b"]])
WORKERS = st.sampled_from(["w1", "w2"])
REQUEST = st.fixed_dictionaries(
    {
        "model": st.sampled_from("ab"),
        "priority": st.sampled_from(Priority),
        "deadline": st.booleans(),
        "key": st.sampled_from([None, None, None, "k1", "k2"]),
        "fingerprint": st.sampled_from(["one", "one", "two"]),
        "special": st.sampled_from([False, False, True]),
        "room": st.sampled_from([0, 0, 0, 0, MEMORY // 4, MEMORY // 2]),
    }
)
ABLE = st.booleans()  # can this worker run special jobs?
# One of the live claims or waiting jobs, or otherwise one of all that ever existed.
WHICH = st.tuples(st.sampled_from([True, True, False]), st.integers(0, 7))

once_claimed = precondition(lambda self: self.claims)
once_submitted = precondition(lambda self: self.jobs)


class QueueMachine(RuleBasedStateMachine):
    """The calls of a few gateways and workers, in any order."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rig = rig
        self.model = Model(CAP, MAX_ATTEMPTS, 0.9 * MEMORY)
        self.jobs: list[str] = []  # the ids of all jobs, and in `claims` all claims
        self.claims: list[Claim] = []
        self.ended: list[RealJob] = []
        self.untold: dict[str, Claim] = {}  # worker → its last claim, if the answer was lost
        rig.client.flushall()
        rig.forget_calls()
        rig.gateway.on_ended = rig.worker.on_ended = self.ended.append

    def teardown(self) -> None:
        self.rig.tally["runs"] += 1

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs one step of the queue. The model's step begins with it."""
        self.rig.tally["calls"] += 1
        self.ended.clear()
        self.model.begin_step()
        return self.rig.run(coroutine)

    def ask(self, question: Coroutine[Any, Any, Any]) -> Any:
        """Returns a call's result, or the kind of its refusal."""

        async def answer() -> Any:
            try:
                return await question
            except (NotFound, NotReady, QueueFull, IdempotencyConflict, ResultsUnavailable) as refusal:
                return type(refusal)

        return self.call(answer())

    def check_ended(self) -> None:
        """Checks that each job that ended as a side effect was reported once."""
        told = sorted((job.id, job.status.value) for job in self.ended)
        require(told == sorted(self.model.ended_unasked), f"told of {told}, expected {self.model.ended_unasked}")
        self.rig.tally.update(f"{status} unasked" for _, status in told)

    def a_claim(self, which: tuple[bool, int]) -> Claim:
        live = [job.holder for job in self.model.jobs.values() if job.holder]
        among = live if which[0] and live else self.claims
        return among[which[1] % len(among)]

    def a_job(self, which: tuple[bool, int]) -> str:
        waiting = [job.id for job in self.model.lines]
        among = waiting if which[0] and waiting else self.jobs
        return among[which[1] % len(among)]

    # Gateways.

    @initialize(requests=st.lists(REQUEST, min_size=1, max_size=CAP), worker=WORKERS, count=st.integers(0, CAP))
    def begin(self, requests: list[dict[str, Any]], worker: str, count: int) -> None:
        for request in requests:
            self.submit_one(**request)
        for _ in range(count):
            self.claim_one(worker, ["a", "b"], able=True)

    @rule(request=REQUEST)
    def submit(self, request: dict[str, Any]) -> None:
        self.submit_one(**request)

    def submit_one(
        self,
        model: str,
        priority: Priority,
        deadline: bool,
        key: str | None,
        fingerprint: str,
        special: bool,
        room: int,
    ) -> None:
        request = a_request(model=model, priority=priority, deadline_seconds=3600.0 if deadline else None)
        needs = {"special"} if special else None
        known = {"idempotency_key": key, "fingerprint": fingerprint, "quiet": len(self.jobs) % 2 == 0}
        answer = self.ask(self.rig.gateway.submit(request, needs=needs, room=room, **known))
        self.check_ended()
        expected, first = self.model.submit_outcome(key, fingerprint, room)
        self.rig.tally[f"submit: {expected}"] += 1
        refusal = {"full": QueueFull, "crowded": NoRoom, "conflict": IdempotencyConflict}.get(expected)
        if refusal or not isinstance(answer, RealJob):
            require(answer is refusal, f"submit answered {answer}, expected {expected}")
        elif expected == "same":
            require(answer.id == first, "a repeated key returns its first job")
        else:
            self.model.accept(Job(answer.id, model, priority.value, deadline, special, room), key, fingerprint)
            self.jobs.append(answer.id)
            require(self.rig.client.exists(keys.bell(model, special=special)), "a new job rings for a worker")

    @once_submitted
    @rule(which=WHICH, running=st.booleans())
    def cancel(self, which: tuple[bool, int], running: bool) -> None:
        job_id = self.a_claim(which).job.id if running and self.claims else self.a_job(which)
        answer = self.ask(self.rig.gateway.cancel(job_id))
        require((answer is NotFound) == (job_id not in self.model.jobs), "known to both or to neither")
        self.model.cancel(job_id)
        self.check_ended()
        job = self.model.jobs.get(job_id)
        if job is not None and job.holder is not None:
            require(self.rig.client.exists(keys.call(job.holder.worker_id)), "a cancel calls the worker")

    @once_submitted
    @rule(which=WHICH, skip=st.integers(0, 3))
    def look(self, which: tuple[bool, int], skip: int) -> None:
        """Watches the picture and, if the job has ended, its events from some position."""
        job_id = self.a_job(which)
        self.ask(self.rig.gateway.get(job_id))  # overdue jobs expire; a picture is read without a script
        self.check_ended()
        picture = self.ask(self.rig.gateway.image(job_id, 0))
        known = self.model.jobs.get(job_id)
        expected = NotFound if known is None else b"0" if known.pictures else NotReady
        require(picture == expected, "the picture is there once it was stored")
        if known is not None and known.ended and not known.collected:
            ids = [entry.decode() for entry, _ in self.rig.client.xrange(keys.events(job_id))]
            seen = min(skip, len(ids))
            events = self.call(watched(self.rig.gateway, job_id, ids[seen - 1] if seen else "0"))
            require([event.type for _, event in events] == known.events[seen:], "a watcher sees what follows its place")
            end, _ = self.call(self.rig.gateway.wait_for_end(job_id))
            require(end.type == known.status, "who waits only for the end gets it")
            self.rig.tally["watched to the end"] += 1

    # Workers.

    @rule(worker=WORKERS, models=MODELS, able=ABLE)
    def claim(self, worker: str, models: list[str], able: bool) -> None:
        """Every other time, it would look for jobs of silent workers, but another worker has just done so."""
        just_looked = len(self.claims) % 2 == 0
        if just_looked:
            self.rig.just_looked(models, able)
            self.rig.tally["claims of idle workers"] += not self.model.lines
        self.claim_one(worker, models, able, take_over=just_looked)

    # Hypothesis leaves out some rules in each run; without this one, little would happen.
    @rule(worker=WORKERS, count=st.integers(1, 3), able=ABLE)
    def claim_several(self, worker: str, count: int, able: bool) -> None:
        for _ in range(count):
            self.claim_one(worker, ["a", "b"], able)
        self.count_held()

    def count_held(self) -> None:
        """As an autoscaler does: whether the holders are silent does not matter."""
        held = self.call(self.rig.gateway.held())
        self.check_ended()
        running = Counter(job.model for job in self.model.jobs.values() if job.holder)
        require(held == running, f"{held} are held, expected {running}")
        self.rig.tally["counts of held jobs"] += held != {}

    def claim_one(self, worker: str, models: list[str], able: bool, take_over: bool = False) -> None:
        taken = self.call(self.rig.worker_that(able).claim(worker, models, block_seconds=0, take_over=take_over))
        expected = self.model.next_up(models, able)
        self.check_ended()
        if self.told_at_last(worker, taken):
            return
        if taken is None:
            require(not expected, "a waiting job was not given out")
        else:
            require(taken.job.id in expected, "the most urgent job goes first, and in order")
            self.model.start(taken)
            self.claims.append(taken)
            self.rig.tally["special claims" if self.model.jobs[taken.job.id].special else "claims"] += 1

    @rule(worker=WORKERS, models=MODELS, able=ABLE)
    def claim_is_not_answered(self, worker: str, models: list[str], able: bool) -> None:
        """The queue server may have started a job then. The worker's later calls find out."""
        untold = self.untold.pop(worker, None)
        taken = self.call(self.rig.unanswered(worker, models, able))
        expected = self.model.next_up(models, able)
        self.check_ended()
        if untold and (job := self.model.owned(untold)):
            job.idle = False
            self.untold[worker] = untold
        elif taken:
            require(taken.job.id in expected, "the most urgent job goes first, told or not")
            self.model.start(taken)
            self.claims.append(taken)
            self.untold[worker] = taken
            self.rig.tally["unanswered claims"] += 1

    def told_at_last(self, worker: str, taken: Claim | None) -> bool:
        """Tells whether this is the answer to the worker's previous call, whose answer was lost."""
        untold = self.untold.pop(worker, None)
        job = untold and self.model.owned(untold)
        if not untold or not job:
            return False
        require(taken and claim_arguments(taken) == claim_arguments(untold), "the same claim, told at last")
        job.idle = False
        self.rig.tally["told at last"] += 1
        return True

    @once_claimed
    @rule(worker=WORKERS, models=MODELS, silent=WHICH, able=ABLE)
    def reclaim(self, worker: str, models: list[str], silent: tuple[bool, int], able: bool) -> None:
        self.fall_silent(self.a_claim(silent))
        self.rig.age_waiting([job.id for job in self.model.lines if job.special])
        taken = self.call(self.rig.worker_that(able).reclaim(worker, models))
        expired = [job_id for job_id, _ in self.model.ended_unasked]
        for job in self.ended:
            if job.id not in expired:
                self.model.end_by_reclaim(job.id, models)
        self.check_ended()
        if self.told_at_last(worker, taken):
            return
        if taken is None:
            self.model.nothing_to_reclaim(models, able)
        else:
            self.model.restart(taken, models, able)
            self.claims.append(taken)
            self.rig.tally["reclaims"] += 1

    @once_claimed
    @rule(which=WHICH)
    def heartbeat(self, which: tuple[bool, int]) -> None:
        claim = self.a_claim(which)
        verdict = self.call(self.rig.worker.heartbeat(claim))
        job = self.owned(claim)
        if job is None:
            require(verdict is Heartbeat.LOST, "a stale worker is told so")
        else:
            require(verdict is (Heartbeat.CANCELLED if job.cancel else Heartbeat.OK), "the holder learns how it stands")
            job.idle = False

    @once_claimed
    @rule(which=WHICH, picture=st.booleans())
    def publish(self, which: tuple[bool, int], picture: bool) -> None:
        claim, worker = self.a_claim(which), self.rig.worker
        started = Started(attempt=claim.attempt, steps=4)
        done = self.call(worker.store_image(claim, 0, b"0") if picture else worker.publish(claim, started))
        job = self.owned(claim)
        require(done == (job is not None), "only the holder publishes")
        if job:
            job.events.append("image" if picture else "started")
            job.pictures |= {0} if picture else set()

    @once_claimed
    @rule(which=WHICH, event=st.sampled_from([DONE, FAILED, Cancelled()]))
    def finish(self, which: tuple[bool, int], event: Any) -> None:
        claim = self.a_claim(which)
        done = self.call(self.rig.worker.finish(claim, event))
        require(done == self.model.finish(self.owned(claim), event.type), "only the holder finishes, and once")
        self.check_ended()

    @once_claimed
    @rule(which=WHICH)
    def release(self, which: tuple[bool, int]) -> None:
        claim = self.a_claim(which)
        done = self.call(self.rig.worker.release(claim))
        job = self.owned(claim)
        require(done == self.model.release(job), "only the holder releases")
        self.check_ended()
        if job is not None and not job.ended:
            require(self.rig.client.exists(keys.bell(job.model, special=job.special)), "who is given back rings")

    def owned(self, claim: Claim) -> Job | None:
        job = self.model.owned(claim)
        self.rig.tally["acts of a holder" if job else "stale acts refused"] += 1
        return job

    # Accidents.

    @once_claimed
    @rule(worker=WORKERS)
    def worker_falls_silent(self, worker: str) -> None:
        for job in self.model.jobs.values():
            if job.holder and job.holder.worker_id == worker:
                self.fall_silent(job.holder)

    def fall_silent(self, claim: Claim) -> None:
        if job := self.model.owned(claim):
            self.rig.age(claim)
            job.idle = True

    @precondition(lambda self: any(job.deadline for job in self.model.lines))
    @rule(which=st.integers(0, 7))
    def deadline_passes(self, which: int) -> None:
        due = [job for job in self.model.lines if job.deadline]
        job = due[which % len(due)]
        self.rig.client.zadd(keys.WAITING, {f"{job.id}:{job.model}": 1}, xx=True)
        job.overdue = True

    @precondition(lambda self: any(job.ended for job in self.model.jobs.values()))
    @rule()
    def results_lapse(self) -> None:
        for job in [job for job in self.model.jobs.values() if job.ended]:
            self.rig.client.delete(keys.job(job.id), keys.events(job.id), keys.images(job.id))
            del self.model.jobs[job.id]

    @rule(chance=st.integers(0, 39))
    def mishap(self, chance: int) -> None:
        """Rarely, empties or kills the server. Then a submit is refused, and accepted jobs are kept."""
        if chance == 17:
            self.rig.client.flushall()
            self.forget_all()
            self.rig.tally["flushes"] += 1
        elif chance in (5, 29):
            self.rig.kill_server()
            with pytest.raises(Unavailable):
                self.rig.run(self.rig.gateway.submit(a_request(model="a"), idempotency_key="k1", fingerprint="one"))
            self.rig.start_server()

    def forget_all(self) -> None:
        """Someone emptied the server."""
        self.model.forget_all()

    @invariant()
    def model_and_queue_agree(self) -> None:
        model = self.model
        real = self.rig.snapshot(list(model.jobs))
        require(sorted(real["waiting"]) == sorted(f"{job.id}:{job.model}" for job in model.lines), "who waits")
        self.check_reserved(list(real["reserved"]), list(real["reviewed"]))  # an empty list comes as {}
        for job_id, job in model.jobs.items():
            (status, attempt, stream, entry, cancel), events, ttls, pictures = real["jobs"][job_id]
            require((status, int(attempt)) == (job.status, job.attempt), f"{status} at {attempt}, expected {job}")
            require(bool(cancel) == job.cancel, "who is to be cancelled")
            published = [EVENT.validate_json(text) for text in events]
            terminal = [event for event in published if isinstance(event, TERMINAL_EVENTS)]
            watched, expected = job.ended and not job.collected, [] if job.collected else job.events
            require(len(terminal) == watched, "one terminal event once ended, none before")
            require([event.type for event in published] == expected, f"events {published}, expected {expected}")
            require(bool(pictures) == bool(job.pictures), "the pictures stored")
            require({ttl > 0 for ttl in ttls if ttl != -2} == {job.ended}, "what has ended lapses, and nothing else")
            if not job.ended:
                require(real["queues"][stream][0].get(entry) == job_id, "a live job has its entry in its stream")
        pending = {(stream, entry) for stream, (_, given) in real["queues"].items() for entry in given}
        running = {(job.holder.stream, job.holder.entry_id) for job in model.jobs.values() if job.holder}
        special = {tuple(real["jobs"][job.id][0][2:4]) for job in model.lines if job.special}
        require(pending - special == running, "an entry is pending exactly while its job runs, or may wait for long")

    def also_reserved(self) -> dict[str, int]:
        """Bytes that are reserved for other things than jobs, by key."""
        return {}

    def check_reserved(self, found: list[str], reviewed: list[str]) -> None:
        rooms = {name: int(size) for name, size in zip(found[::2], found[1::2], strict=True)}
        total = rooms.pop("total", 0)
        require(total == sum(rooms.values()), "the total is the sum")
        require(sorted(rooms) == sorted(reviewed), "no reservation is without an end")
        expected = {keys.job(job_id): room for job_id, room in self.model.reserved().items()} | self.also_reserved()
        require(rooms == expected, f"reserved for {rooms}, expected {expected}")

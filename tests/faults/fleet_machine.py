"""The calls that many workers make cheap: heartbeats and news together, looks in turn, and cards that gateways keep."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from patchforge.service.messages.events import Cancelled
from patchforge.service.queue import keys
from patchforge.service.queue.claims import Heartbeat, finished, stored
from tests.faults.queue_machine import ABLE, FAILED, MODELS, WHICH, WORKERS, QueueMachine, once_claimed
from tests.faults.queue_model import require
from tests.faults.queue_rig import Rig
from tests.service.queue.kit import DONE, a_card


class FleetMachine(QueueMachine):
    """Adds what a fleet of workers does, and what a gateway knows of it."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.served: dict[str, list[str]] = {}  # worker → the models that it announced
        self.vanished: set[str] = set()  # workers whose announcements were lost with everything else

    def forget_all(self) -> None:
        super().forget_all()
        self.vanished |= self.served.keys()
        self.served.clear()

    # Gateways.

    @rule()
    def count_the_waiting(self) -> None:
        self.count_waiting()

    def count_waiting(self) -> None:
        backlog = self.call(self.rig.gateway.backlog())
        self.check_ended()
        require(backlog.jobs == Counter(job.model for job in self.model.lines), "all that waits is counted")
        hurried = Counter(job.model for job in self.model.lines if job.id not in self.jobs_of_batches())
        require(backlog.hurried == hurried, "nobody waits for batches")
        require(backlog.oldest.keys() == hurried.keys(), "and so they do not grow old")

    def jobs_of_batches(self) -> set[str]:
        """Ids of the jobs that batches have not seen end."""
        return set()

    @rule()
    def ask_who_serves(self) -> None:
        """A gateway that read the announcements before reads only what changed since."""
        self.count_waiting()  # otherwise it depends on what it has to read whether overdue jobs expire
        known = self.rig.run(self.rig.gateway.known_workers())
        served = {worker: [card.name for card in each.cards] for worker, each in known.items()}
        for worker in self.vanished & served.keys():
            del served[worker]  # the server was emptied, and nobody told the gateway
        require(served == self.served, f"knows {served}, but {self.served} are served")
        self.rig.tally["rosters"] += 1

    # Workers.

    @rule(worker=WORKERS, models=MODELS)
    def announce(self, worker: str, models: list[str]) -> None:
        self.call(self.rig.worker.announce(worker, [a_card(name) for name in models]))
        self.check_ended()
        self.served[worker] = models
        self.vanished.discard(worker)

    @rule(worker=WORKERS)
    def retire(self, worker: str) -> None:
        self.call(self.rig.worker.retire(worker))
        self.check_ended()
        self.served.pop(worker, None)
        self.vanished.discard(worker)

    @once_claimed
    @rule(worker=WORKERS, models=MODELS, silent=WHICH, able=ABLE)
    def claim_or_take_over(self, worker: str, models: list[str], silent: tuple[bool, int], able: bool) -> None:
        """Claims with a look for jobs of silent workers, which is due."""
        self.fall_silent(self.a_claim(silent))
        self.rig.age_waiting([job.id for job in self.model.lines if job.special])
        self.rig.client.delete(keys.LOOKED)
        taken = self.call(self.rig.worker_that(able).claim(worker, models, block_seconds=0, take_over=True))
        expired = [job_id for job_id, _ in self.model.ended_unasked]
        for job in self.ended:
            if job.id not in expired:
                self.model.end_by_reclaim(job.id, models)
        self.check_ended()
        if self.told_at_last(worker, taken):
            return
        if taken is not None and taken.taken_over:
            self.model.restart(taken, models, able)
            self.claims.append(taken)
            self.rig.tally["taken over in turn"] += 1
            return
        self.model.nothing_to_reclaim(models, able)
        expected = self.model.next_up(models, able)
        require((taken.job.id in expected) if taken else not expected, "without silent jobs, it is a claim")
        if taken:
            self.model.start(taken)
            self.claims.append(taken)

    @once_claimed
    @rule(worker=WORKERS)
    def heartbeats_together(self, worker: str) -> None:
        """All claims that a worker ever got, in one call."""
        claims = [claim for claim in self.claims if claim.worker_id == worker]
        if not claims:
            return
        for claim, verdict in zip(claims, self.call(self.rig.worker.keep(claims)), strict=True):
            job = self.owned(claim)
            expected = Heartbeat.LOST if job is None else Heartbeat.CANCELLED if job.cancel else Heartbeat.OK
            require(verdict is expected, "each claim has its own verdict")
            if job:
                job.idle = False

    @once_claimed
    @rule(which=st.lists(WHICH, min_size=2, max_size=4), event=st.sampled_from([DONE, FAILED, Cancelled()]))
    def deliver_together(self, which: list[tuple[bool, int]], event: Any) -> None:
        """Pictures and the end of one job, and whatever else, in one call."""
        claims = [self.a_claim(each) for each in which]
        deliveries = [stored(claim, 0, b"0") for claim in claims] + [finished(claims[0], event)]
        done = self.call(self.rig.worker.deliver(deliveries))
        for claim, accepted in zip(claims, done, strict=False):
            job = self.owned(claim)
            require(accepted == (job is not None), "only the holder stores pictures")
            if job:
                job.events.append("image")
                job.pictures.add(0)
        require(done[-1] == self.model.finish(self.owned(claims[0]), event.type), "only the holder finishes, and once")
        self.check_ended()
        self.rig.tally["deliveries together"] += 1

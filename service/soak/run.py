"""One soak from start to end: start everything, let traffic and mishaps run, let it settle, and judge."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.soak.audit import Audit
from service.soak.chaos import Chaos
from service.soak.fleet import Fleet
from service.soak.ledger import TERMINAL, Ledger
from service.soak.memory import Memory, resident
from service.soak.traffic import Client
from service.threads import in_thread

SAMPLE_SECONDS = 2.0
SETTLE_SECONDS = 300.0  # for the jobs still queued when the traffic ends
WARM_SHARE, WARM_SECONDS = 0.25, 60.0  # traffic before memory counts: the lesser of the two
QUIET_SECONDS = 1.0


@dataclass(frozen=True)
class Verdict:
    """What came of a soak; ``broken`` lists every promise that was not kept."""

    tally: dict[str, int]
    answers: dict[str, int]
    mishaps: dict[str, int]
    memory: dict[str, list[float]]
    trend: dict[str, float]
    lasting: dict[str, int]
    broken: list[str]


class Soak:
    """``clients`` callers for ``seconds``; ``hurry`` divides the time between mishaps, 0: there are none."""

    def __init__(self, fleet: Fleet, seconds: float, clients: int, seed: int, hurry: float = 1.0) -> None:
        self.fleet, self.seconds = fleet, seconds
        self.ledger = Ledger()
        self.audit = Audit(fleet.server.url, self.ledger)
        self.memory = Memory()
        chance = random.Random(seed)
        self.chaos = Chaos(fleet, self.ledger, random.Random(chance.random()), hurry)
        self.clients = [Client(fleet.gateways, self.ledger, random.Random(chance.random())) for _ in range(clients)]
        self._done = asyncio.Event()

    async def run(self, progress: Callable[[float, str], None]) -> Verdict:
        """``progress`` gets the seconds passed and the tally in words, every second."""
        auditing = asyncio.create_task(self.audit.run())
        try:
            await self._let_it_rain(progress)
            await self._settle(progress)
        finally:
            auditing.cancel()
            await asyncio.gather(auditing, return_exceptions=True)
        try:
            return self._judge()
        finally:
            self.audit.close()

    def tally(self) -> dict[str, int]:
        accepted = len(self.audit.accepted)
        ended = {status: self.audit.count(status) for status in TERMINAL}
        return {"accepted": accepted, **ended, "lost": accepted - sum(ended.values())}

    async def _let_it_rain(self, progress: Callable[[float, str], None]) -> None:
        began = time.monotonic()
        talking = [asyncio.create_task(client.run(self._done)) for client in self.clients]
        chaos = asyncio.create_task(self.chaos.run())
        sampled = warm = began + min(WARM_SECONDS, WARM_SHARE * self.seconds)
        try:
            while (now := time.monotonic()) < began + self.seconds:
                if now > warm and now >= sampled:
                    self._sample_memory()
                    sampled = now + SAMPLE_SECONDS
                for task in (*talking, chaos):
                    if task.done():
                        await task  # it never ends by itself: this raises what ended it
                self._look_for_deaths()
                progress(now - began, self._in_words())
                await asyncio.sleep(1)
        finally:
            self._done.set()
            chaos.cancel()
            await asyncio.gather(chaos, return_exceptions=True)
            self.fleet.restore()
        progress(self.seconds, "waiting for the last answers")
        await asyncio.gather(*talking)

    async def _settle(self, progress: Callable[[float, str], None]) -> None:
        """Until every job has ended, nothing is queued, and one more look confirms it."""
        await self.fleet.ready()
        give_up = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < give_up:
            looked = await in_thread(self.audit.try_to_look)
            progress(self.seconds, self._in_words())
            if looked and not self.audit.live:
                break
            await asyncio.sleep(QUIET_SECONDS)
        await asyncio.sleep(2 * QUIET_SECONDS)  # idle workers pass over the entries of jobs that ended unclaimed
        await in_thread(self.audit.try_to_look)

    def _judge(self) -> Verdict:
        lasting = self.audit.lasting_keys()
        broken = list(self.ledger.broken)
        tally = self.tally()
        if tally["lost"]:
            lost = sorted(self.audit.accepted - self.audit.ended.keys())
            broken.append(f"{tally['lost']} accepted jobs never ended: {', '.join(lost[:10])}")
        if lasting["queue entries"]:
            broken.append(f"{lasting['queue entries']} entries are left in the queues")
        broken += [f"{name} has grown" for name in self.memory.grown()]
        return Verdict(
            tally | {"dead letters": self.audit.dead_letters},
            dict(sorted(self.ledger.answers.items())),
            dict(sorted(self.chaos.done.items())),
            self.memory.course(),
            self.memory.trend(),
            dict(sorted(lasting.items())),
            broken,
        )

    def _sample_memory(self) -> None:
        sizes = {member.name: resident(member.pid) for member in self.fleet.members if member.spared}
        self.memory.sample(sizes | {"queue server (data)": self.audit.used_memory()})

    def _look_for_deaths(self) -> None:
        for member in self.fleet.members:
            if not member.running and not member.busy:
                self.ledger.blame(f"{member.name} ended by itself; see {member.log}")
                member.start()
        if not self.fleet.server.running and not self.fleet.server_busy:
            self.ledger.blame("the queue server ended by itself")
            self.fleet.server.stop()
            self.fleet.server.start()

    def _in_words(self) -> str:
        tally = {kind: count for kind, count in self.tally().items() if kind != "lost"}
        words = [f"{count} {kind}" for kind, count in tally.items() if count]
        words.append(f"{len(self.audit.live)} live")
        words.append(f"{sum(self.chaos.done.values())} mishaps")
        if self.ledger.broken:
            words.append(f"{len(self.ledger.broken)} BROKEN, the last: {self.ledger.broken[-1]}")
        return ", ".join(words)


async def soak(
    folder: Path,
    bundle_dir: Path,
    seconds: float,
    clients: int,
    seed: int,
    progress: Callable[[float, str], None],
    hurry: float = 1.0,
) -> Verdict:
    """Starts everything in ``folder``, runs the soak and takes it down again."""
    async with Fleet(folder, bundle_dir) as fleet:
        return await Soak(fleet, seconds, clients, seed, hurry).run(progress)

"""One soak: starts everything, runs traffic and faults, waits for the last jobs, and gives a verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patchforge.service.queue.connection import REVIEW_SECONDS
from patchforge.service.soak.audit import Audit
from patchforge.service.soak.chaos import Chaos
from patchforge.service.soak.fleet import RESULT_TTL, Fleet
from patchforge.service.soak.ledger import TERMINAL, Ledger
from patchforge.service.soak.memory import Memory, resident
from patchforge.service.soak.traffic import Client
from patchforge.service.soak.upgrade import Upgrade
from patchforge.service.soak.versions import TODAY, Version, other_version
from patchforge.service.threads import in_thread

SAMPLE_SECONDS = 2.0
SETTLE_SECONDS = 300.0  # limit for the jobs that are queued when the traffic ends
WARM_SHARE, WARM_SECONDS = 0.25, 60.0  # traffic before memory is measured: the smaller of the two
QUIET_SECONDS = 1.0
LATEST_REVIEW_SECONDS = 30.0  # after it is due, on a busy machine


@dataclass(frozen=True)
class Verdict:
    """Result of a soak; `broken` lists every broken promise."""

    tally: dict[str, int]
    answers: dict[str, int]
    faults: dict[str, int]
    memory: dict[str, list[float]]
    trend: dict[str, float]
    lasting: dict[str, int]
    broken: list[str]


class Soak:
    """`clients` clients for `seconds`; `hurry` divides the time between faults, and 0 means no faults.

    A fleet that is of an `older` version is upgraded meanwhile.
    """

    def __init__(
        self, fleet: Fleet, seconds: float, clients: int, seed: int, hurry: float = 1.0, older: Version = TODAY
    ) -> None:
        self.fleet, self.seconds = fleet, seconds
        self.ledger = Ledger()
        self.audit = Audit(fleet.servers.client, self.ledger, RESULT_TTL)
        self.memory = Memory()
        chance = random.Random(seed)
        self.chaos = Chaos(fleet, self.ledger, random.Random(chance.random()), hurry)
        self.upgrade = None if older == TODAY else Upgrade(fleet, self.ledger, older)
        self.clients = [
            Client(fleet.gateways, self.ledger, random.Random(chance.random()), cut_answers=older != TODAY)
            for _ in range(clients)
        ]
        self._done = asyncio.Event()

    async def run(self, progress: Callable[[float, str], None]) -> Verdict:
        """`progress` gets the elapsed seconds and the tally in words, once per second."""
        auditing = asyncio.create_task(self.audit.run())
        try:
            await self._run_traffic(progress)
            await self._await_last_jobs(progress)
        finally:
            auditing.cancel()
            await asyncio.gather(auditing, return_exceptions=True)
        return self._judge()

    def tally(self) -> dict[str, int]:
        ended = {status: self.audit.count(status) for status in TERMINAL}
        return {"accepted": len(self.audit.accepted), **ended, "lost": len(self.audit.lost)}

    async def _run_traffic(self, progress: Callable[[float, str], None]) -> None:
        began = time.monotonic()
        running = [asyncio.create_task(client.run(self._done)) for client in self.clients]
        chaos = asyncio.create_task(self.chaos.run())
        upgrade = asyncio.create_task(self.upgrade.run(self.seconds)) if self.upgrade else None
        sampled = warm = began + min(WARM_SECONDS, WARM_SHARE * self.seconds)
        try:
            while (now := time.monotonic()) < began + self.seconds or (upgrade and not upgrade.done()):
                if now > warm and now >= sampled:
                    await in_thread(self._sample_memory)
                    sampled = now + SAMPLE_SECONDS
                for task in (*running, chaos, *([upgrade] if upgrade else [])):
                    if task.done():
                        await task  # apart from a finished upgrade, it has failed: raise its error
                self._restart_dead()
                upgrading = "" if now < began + self.seconds else ", until the upgrade is through"
                progress(now - began, self._describe() + upgrading)
                await asyncio.sleep(1)
        finally:
            self._done.set()
            harming = [chaos, *([upgrade] if upgrade else [])]
            for task in harming:
                task.cancel()
            await asyncio.gather(*harming, return_exceptions=True)
            await self.fleet.restore()
        progress(self.seconds, "waiting for the last answers")
        await asyncio.gather(*running)

    async def _await_last_jobs(self, progress: Callable[[float, str], None]) -> None:
        """Wait until every job has ended and nothing is queued, then scan once more."""
        await self.fleet.wait_until_ready()
        give_up = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < give_up:
            scanned = await in_thread(self.audit.try_to_scan)
            progress(self.seconds, self._describe())
            if scanned and not self.audit.live:
                break
            await asyncio.sleep(QUIET_SECONDS)
        await asyncio.sleep(2 * QUIET_SECONDS)  # idle workers skip the entries of jobs that ended unclaimed
        if self.upgrade:
            await self._await_review(progress)
        await in_thread(self.audit.try_to_scan)

    async def _await_review(self, progress: Callable[[float, str], None]) -> None:
        async def look() -> None:
            progress(self.seconds, "waiting for the review of reserved memory")
            await self.fleet.scrape()

        await self.audit.await_review(look, REVIEW_SECONDS + LATEST_REVIEW_SECONDS)

    def _judge(self) -> Verdict:
        lasting = self.audit.lasting_keys()
        broken = list(self.ledger.broken)
        tally = self.tally()
        if tally["lost"]:
            lost = sorted(self.audit.lost)
            broken.append(f"{tally['lost']} accepted jobs never ended: {', '.join(lost[:10])}")
        if lasting["queue entries"]:
            broken.append(f"{lasting['queue entries']} entries remain in the queues")
        if lasting["reserved bytes"]:
            keys = ", ".join(sorted(self.audit.reserved())[:10])
            broken.append(f"{lasting['reserved bytes']} bytes are reserved, but no job is left: {keys}")
        broken += [f"the memory of {name} has grown" for name in self.memory.grown()]
        return Verdict(
            tally | {"dead letters": len(self.audit.dead_letters), "undone": len(self.audit.undone)},
            dict(sorted(self.ledger.answers.items())),
            dict(sorted((self.chaos.done + (self.upgrade.done if self.upgrade else Counter())).items())),
            self.memory.course(),
            self.memory.trend(),
            dict(sorted(lasting.items())),
            broken,
        )

    def _sample_memory(self) -> None:
        sizes = {member.label: resident(member.pid) for member in self.fleet.members if member.spared}
        self.memory.sample(sizes | {"queue server (data)": self.audit.used_memory()})

    def _restart_dead(self) -> None:
        for member in self.fleet.members:
            if not member.running and not member.disturbed:
                self.ledger.broken.append(f"{member.name} ended by itself; see {member.log}")
                member.start()
        if not self.fleet.server_disturbed:
            self.ledger.broken += [f"{name} ended by itself" for name in self.fleet.servers.revive()]

    def _describe(self) -> str:
        tally = {kind: count for kind, count in self.tally().items() if kind != "lost"}
        words = [f"{count} {kind}" for kind, count in tally.items() if count]
        words.append(f"{len(self.audit.live)} live")
        words.append(f"{sum(self.chaos.done.values())} faults")
        if self.ledger.broken:
            words.append(f"{len(self.ledger.broken)} BROKEN, latest: {self.ledger.broken[-1]}")
        return ", ".join(words)


async def soak(
    folder: Path,
    bundle_dir: Path,
    seconds: float,
    clients: int,
    seed: int,
    progress: Callable[[float, str], None],
    hurry: float = 1.0,
    sentinels: bool = False,
    from_version: Path | None = None,
) -> Verdict:
    """Start everything in `folder`, run the soak, and stop everything.

    Raises:
        InvalidRequest: `from_version` is no version.
    """
    older = other_version(from_version, folder / "older") if from_version else TODAY
    async with Fleet(folder, bundle_dir, sentinels=sentinels, version=older) as fleet:
        return await Soak(fleet, seconds, clients, seed, hurry, older).run(progress)

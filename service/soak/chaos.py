"""The faults of a soak: kills, stops and pauses gateways, workers and the queue server."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter

from patchforge.service.soak.fleet import CLAIM_IDLE, Fleet, Member
from patchforge.service.soak.ledger import Ledger

PAUSE = (3.0, 9.0)  # seconds between two faults of a gateway or worker
SERVER_PAUSE = (15.0, 40.0)  # seconds between two faults of the queue server
OUTAGE = (0.2, 3.0)  # seconds until a killed process starts again


class Chaos:
    """Causes faults until cancelled; `fleet.restore` repairs the fleet afterwards."""

    def __init__(self, fleet: Fleet, ledger: Ledger, chance: random.Random, hurry: float = 1.0) -> None:
        """`hurry` divides the time between faults; 0 means no faults."""
        self.fleet, self.ledger, self.chance, self.hurry = fleet, ledger, chance, hurry
        self.done: Counter[str] = Counter()

    async def run(self) -> None:
        if not self.hurry:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._harm_members())
            both.create_task(self._harm_server())

    async def _harm_members(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(*PAUSE) / self.hurry)
            fault = self.chance.choice((self.kill, self.kill, self.terminate, self.pause))
            # A spared member may be paused, because a pause does not reset its memory.
            calm = [m for m in self.fleet.members if not m.disturbed]
            candidates = [m for m in calm if fault == self.pause or not m.spared]
            if not candidates:
                continue
            member = self.chance.choice(candidates)
            member.disturbed = True
            await fault(member)
            member.disturbed = False
            self.done[f"{fault.__name__} {member.role}"] += 1

    async def _harm_server(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(*SERVER_PAUSE) / self.hurry)
            fault = self.chance.choice(self.fleet.servers.faults)
            self.fleet.server_disturbed = True
            await fault(self._wait_outage)
            self.fleet.server_disturbed = False
            self.done[fault.__name__.replace("_", " ")] += 1

    async def kill(self, member: Member) -> None:
        member.send(signal.SIGKILL)
        await member.wait()
        await self._wait_outage()
        member.start()

    async def terminate(self, member: Member) -> None:
        await stop(member, self.ledger)
        member.start()

    async def pause(self, member: Member) -> None:
        """Pause it for longer than a claim lasts, so that its later answers come too late."""
        member.send(signal.SIGSTOP)
        await asyncio.sleep(1.4 * CLAIM_IDLE)
        member.send(signal.SIGCONT)

    async def _wait_outage(self) -> None:
        await asyncio.sleep(self.chance.uniform(*OUTAGE))


async def stop(member: Member, ledger: Ledger) -> None:
    """Send SIGTERM; the process must end by itself with status 0."""
    member.send(signal.SIGTERM)
    status = await member.wait()
    if status not in (0, -signal.SIGTERM):  # the signal, if it had not yet set its handler
        ledger.broken.append(f"{member.name} ended with {status} on SIGTERM")
    if member.running:
        member.send(signal.SIGKILL)
        await member.wait()

"""What goes wrong in a soak: processes killed, stopped and paused, and the queue server with them."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter

from service.soak.fleet import CLAIM_IDLE, Fleet, Member
from service.soak.ledger import Ledger
from service.threads import in_thread

PAUSE = (3.0, 9.0)  # seconds between two mishaps of a gateway or worker
SERVER_PAUSE = (15.0, 40.0)  # and of the queue server
OUTAGE = (0.2, 3.0)  # how long what was killed stays away


class Chaos:
    """Runs until cancelled; then ``fleet.restore`` makes everything well again."""

    def __init__(self, fleet: Fleet, ledger: Ledger, chance: random.Random, hurry: float = 1.0) -> None:
        """``hurry`` divides the time between mishaps; 0: there are none."""
        self.fleet, self.ledger, self.chance, self.hurry = fleet, ledger, chance, hurry
        self.done: Counter[str] = Counter()

    async def run(self) -> None:
        if not self.hurry:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._members())
            both.create_task(self._server())

    async def _members(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(*PAUSE) / self.hurry)
            mishap = self.chance.choice((self.kill, self.kill, self.terminate, self.pause))
            # The spared ones may be paused: that leaves their memory to be followed.
            among = [m for m in self.fleet.members if mishap == self.pause or not m.spared]
            member = self.chance.choice(among)
            member.busy = True
            await mishap(member)
            member.busy = False
            self.done[f"{mishap.__name__} {member.role}"] += 1

    async def _server(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(*SERVER_PAUSE) / self.hurry)
            mishap = self.chance.choice((self.kill_server, self.kill_server, self.stop_server, self.pause_server))
            self.fleet.server_busy = True
            await mishap()
            self.fleet.server_busy = False
            self.done[mishap.__name__.replace("_", " ")] += 1

    async def kill(self, member: Member) -> None:
        member.send(signal.SIGKILL)
        await member.ended()
        await self._outage()
        member.start()

    async def terminate(self, member: Member) -> None:
        """It must end by itself, and well."""
        member.send(signal.SIGTERM)
        status = await member.ended()
        if status not in (0, -signal.SIGTERM):  # the latter: it was only just starting
            self.ledger.blame(f"{member.name} ended with {status} on SIGTERM")
        if member.running:
            member.send(signal.SIGKILL)
            await member.ended()
        member.start()

    async def pause(self, member: Member) -> None:
        """Longer than a claim lasts; whatever it does afterwards comes too late."""
        member.send(signal.SIGSTOP)
        await asyncio.sleep(1.4 * CLAIM_IDLE)
        member.send(signal.SIGCONT)

    async def kill_server(self) -> None:
        await in_thread(self.fleet.server.kill)
        await self._outage()
        self.fleet.server.stop()
        self.fleet.server.start()

    async def stop_server(self) -> None:
        os.kill(self.fleet.server.pid, signal.SIGTERM)
        await self._outage()
        self.fleet.server.stop()
        self.fleet.server.start()

    async def pause_server(self) -> None:
        os.kill(self.fleet.server.pid, signal.SIGSTOP)
        await self._outage()
        os.kill(self.fleet.server.pid, signal.SIGCONT)

    async def _outage(self) -> None:
        await asyncio.sleep(self.chance.uniform(*OUTAGE))

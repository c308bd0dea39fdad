"""A rolling change of versions during a soak: there, back again, and there for good."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from patchforge.service.soak.chaos import stop
from patchforge.service.soak.fleet import Fleet, Member
from patchforge.service.soak.ledger import Ledger
from patchforge.service.soak.versions import TODAY, Version

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Wave:
    """All processes change to `version`, one by one, when this share of the soak has passed."""

    share: float
    version: Version
    workers_first: bool


class Upgrade:
    """Changes a fleet from one version to today's; `done` counts the changes."""

    def __init__(self, fleet: Fleet, ledger: Ledger, older: Version) -> None:
        self.fleet, self.ledger = fleet, ledger
        self.waves: Sequence[Wave] = (Wave(0.25, TODAY, True), Wave(0.4, older, False), Wave(0.55, TODAY, False))
        self.done: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """`seconds` is the duration of the soak."""
        began = asyncio.get_running_loop().time()
        for wave in self.waves:
            await asyncio.sleep(began + wave.share * seconds - asyncio.get_running_loop().time())
            groups = self.fleet.workers, self.fleet.gateways
            for group in groups if wave.workers_first else reversed(groups):
                for member in group:
                    await self._replace(member, wave.version)

    async def _replace(self, member: Member, version: Version) -> None:
        while True:
            if not member.disturbed:
                break
            await asyncio.sleep(LOOK_SECONDS)
        member.disturbed = True
        await stop(member, self.ledger)
        member.version = version
        member.life += 1
        member.start()
        if not await member.started():
            self.ledger.broken.append(f"{member.name} of {version.name} did not start; see {member.log}")
        member.disturbed = False
        self.done[f"{member.role} to {version.name}"] += 1

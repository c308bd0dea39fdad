"""Turns time into quality: how much of their usual work can pictures have, so that answers come in time?

Every picture has a time at which it is due: what its request says (`finish_within_seconds`), or else a multiple of the
time that it would take alone. From the measured speed follows how much work fits before each of these times. Pictures
whose quality may be lowered share it: all that are due before the tightest time get a share of their usual work, the
larger the more they gain by it. If everything fits, all shares are 1, and nothing changes. Counts seconds and patches,
touches no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HEADROOM = 0.8
"""Share of the time left that is given away. Forecasts err, and more requests come."""
OUTLIER = 4.0
"""A measurement counts as at most this many times what was expected: outages must not look like a slow device."""
FEWEST = 3.0
"""Weight of the measurements from which the speed counts as known. The first evaluations set things up."""
ENOUGH = 0.9
"""Share of the best throughput that smaller evaluations must have."""
DECAY = 0.95
"""Weight of a measurement after the next one."""


@dataclass(frozen=True)
class Work:
    """Work that a worker has before it: of a picture, or of a job that still waits for a worker."""

    seconds: float
    """What it takes of the worker, if nothing is lowered."""
    due: float
    """Seconds from now; negative: it is late."""
    flexible: bool
    """Whether its quality may be lowered. Other work is done too, but nothing is lowered for its sake."""
    gain: float = 1.0
    """What more work brings, relative to other works: where time is short, shares are proportional to it."""


def shares(works: Sequence[Work]) -> list[float]:
    """Return for each work which share of it can be done in time, 0 to 1; 1 for work that is not flexible.

    The tightest time limits all flexible work that is due by then to the same share on average; its works share in
    proportion to their gains. Later work shares what is left.
    """
    order = sorted(range(len(works)), key=lambda index: works[index].due)
    found = [1.0] * len(works)
    start, taken = 0, 0.0
    while start < len(order):
        flexible, fixed, tightest, until = 0.0, taken, 1.0, len(order)
        for place in range(start, len(order)):
            work = works[order[place]]
            if not work.flexible:
                fixed += work.seconds
                continue
            flexible += work.seconds
            share = max(0.0, HEADROOM * work.due - fixed) / flexible if flexible else 1.0
            if share < tightest:
                tightest, until = share, place + 1
        some = [index for index in order[start:until] if works[index].flexible]
        for index, share in zip(some, _spread([works[index] for index in some], tightest), strict=True):
            found[index] = share
        taken += sum(found[index] * works[index].seconds for index in order[start:until])
        start = until
    return found


def _spread(works: Sequence[Work], average: float) -> list[float]:
    """Return shares of at most 1 in proportion to the gains, which take `average` of all seconds together."""
    left = average * sum(work.seconds for work in works)
    shares = [1.0] * len(works)
    going = set(range(len(works))) if average < 1 else set()
    while going:
        gains = sum(works[index].gain * works[index].seconds for index in going)
        level = left / gains if gains else 0.0
        full = {index for index in going if level * works[index].gain >= 1}
        if not full:
            for index in going:
                shares[index] = level * works[index].gain
            break
        left = max(0.0, left - sum(works[index].seconds for index in full))
        going -= full
    return shares


@dataclass
class Speed:
    """How long evaluations of one model take: a line through what was measured, in which the newest counts most."""

    weight: float = 0.0
    patches: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    decode: float | None = None
    """Seconds to decode and encode one picture; None: not measured yet."""

    def evaluated(self, patches: int, seconds: float) -> None:
        """Record an evaluation, with all the work around it except decoding finished pictures."""
        if self.known:
            seconds = min(seconds, OUTLIER * self.evaluation(patches))
        for name, value in (
            ("weight", 1.0),
            ("patches", patches),
            ("seconds", seconds),
            ("squares", patches * patches),
            ("products", patches * seconds),
        ):
            setattr(self, name, DECAY * getattr(self, name) + value)

    def decoded(self, pictures: int, seconds: float) -> None:
        """Record how long finished pictures took to decode and encode."""
        each = seconds / pictures
        self.decode = each if self.decode is None else DECAY * self.decode + (1 - DECAY) * each

    @property
    def known(self) -> bool:
        return self.weight >= FEWEST and self.decode is not None

    def evaluation(self, patches: float) -> float:
        """Seconds of an evaluation of so many patches."""
        spread = self.weight * self.squares - self.patches**2
        slope = (self.weight * self.products - self.patches * self.seconds) / spread if spread > 1e-9 else math.inf
        most = self.seconds / self.patches
        slope = min(max(slope, 0.0), most)  # neither end of the line may be below zero
        return (self.seconds - slope * self.patches) / self.weight + slope * patches

    def smallest_pack(self, budget: int) -> int:
        """The fewest patches of an evaluation with `ENOUGH` of the throughput of one with `budget` patches."""
        most = self.per_patch(budget) / ENOUGH if self.known else 0.0
        overhead = self.evaluation(0) if self.known else 0.0
        slope = self.per_patch(budget) - overhead / budget if self.known else 0.0
        return max(budget // 4, min(budget, math.ceil(overhead / (most - slope)))) if most > slope else budget

    def per_patch(self, pack: float) -> float:
        """Seconds per patch in evaluations of `pack` patches."""
        return self.evaluation(pack) / pack

    def run(self, costs: Sequence[float], pictures: int = 1) -> float:
        """Seconds of pictures drawn alone, whose evaluations together have so many patches."""
        return sum(map(self.evaluation, costs)) + pictures * (self.decode or 0.0)


@dataclass(frozen=True)
class Allowance:
    """What time allows a picture from now on."""

    patches: float
    """Patch evaluations."""
    lands: bool
    """Whether it may be finished worse than the floor, to be in time."""


@dataclass(frozen=True)
class Backlog:
    """Jobs of one model that wait for a worker, as far as they are this worker's share."""

    jobs: float
    oldest: float
    """Seconds that the oldest of them has waited."""

    def works(self, seconds: float, due: float) -> list[Work]:
        """The jobs as work of `seconds` each, due so long after they came. They came at regular intervals."""
        count = math.ceil(self.jobs)
        return [Work(seconds, due - self.oldest * (count - number) / count, True) for number in range(count)]

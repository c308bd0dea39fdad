"""Turns time into quality: how much of their usual work can pictures have, so that answers come in time?

Every picture has a time at which it is due: what its request says (`finish_within_seconds`), or else a multiple of the
time that it would take alone. From the measured speed follows how much work fits before each of these times. Pictures
whose quality may be lowered share it: all that are due before the tightest time get a share of their usual work, the
larger the more they gain by it. If everything fits, all shares are 1, and nothing changes. Counts seconds and patches,
touches no tensor.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

HEADROOM = 0.8
"""Share of the time left that is given away. Forecasts err, and more requests come."""
OUTLIER = 4.0
"""A measurement counts as at most this many times what was expected: outages must not look like a slow device."""
FEWEST = 4
"""Evaluations from which the speed counts as known. The first ones set things up."""
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
class SizeMeans:
    """Evaluations of about one size: means, in which the newest count most."""

    weight: float = 0.0
    patches: float = 0.0
    seconds: float = 0.0

    def add(self, patches: float, seconds: float) -> None:
        """Record one."""
        self.weight = DECAY * self.weight + 1
        self.patches += (patches - self.patches) / self.weight
        self.seconds += (seconds - self.seconds) / self.weight


@dataclass
class DutyMeans:
    """What else a worker does between evaluations: means, in which the newest count most."""

    weight: float = 0.0
    evaluating: float = 0.0
    """Seconds of an evaluation, of any size."""
    others: float = 0.0
    """Seconds between it and the one before."""

    def add(self, evaluating: float, others: float) -> None:
        """Record an evaluation, and what was done before it."""
        self.weight = DECAY * self.weight + 1
        self.evaluating += (evaluating - self.evaluating) / self.weight
        self.others += (others - self.others) / self.weight

    @property
    def drag(self) -> float:
        """Seconds in which the worker makes evaluations of one second: at least 1."""
        return 1 + self.others / self.evaluating if self.evaluating else 1.0


@dataclass
class Speed:
    """How long the work for one model takes.

    Evaluations are remembered by size, up to a factor of two: under load there are only large ones, and what a picture
    takes alone must not be forgotten.
    """

    sizes: dict[int, SizeMeans] = field(default_factory=dict)
    """By the patches' number of binary digits."""
    measured: int = 0
    """Number of evaluations."""
    duties: DutyMeans = field(default_factory=DutyMeans)
    begin: float = 0.0
    """Seconds to begin one job: to read its prompt, to encode its source picture."""
    decode: float | None = None
    """Seconds to decode and encode one picture; None: not measured yet."""

    def evaluated(self, patches: int, seconds: float, others: float = 0.0) -> None:
        """Record an evaluation with all the work around it, except decoding finished pictures.

        `others` is what the worker has done since the evaluation before, such as beginning other jobs.
        """
        if self.known:
            seconds = min(seconds, OUTLIER * self.evaluation(patches))
        self.sizes.setdefault(patches.bit_length(), SizeMeans()).add(patches, seconds)
        self.duties.add(seconds, min(others, OUTLIER * seconds))
        self.measured += 1

    def began(self, seconds: float) -> None:
        """Record how long the beginning of a job took."""
        self.begin = DECAY * self.begin + (1 - DECAY) * seconds if self.begin else seconds

    def decoded(self, pictures: int, seconds: float) -> None:
        """Record how long finished pictures took to decode and encode."""
        each = seconds / pictures
        self.decode = each if self.decode is None else DECAY * self.decode + (1 - DECAY) * each

    @property
    def known(self) -> bool:
        return self.measured >= FEWEST and self.decode is not None

    @property
    def drag(self) -> float:
        """Seconds in which the worker makes evaluations of one second: more than 1, since it also does other things."""
        return self.duties.drag

    def evaluation(self, patches: float) -> float:
        """Seconds of an evaluation of so many patches: on the line between the sizes that were measured."""
        sizes = sorted(self.sizes.values(), key=lambda size: size.patches)
        place = bisect([size.patches for size in sizes], patches)
        low = sizes[max(0, min(place - 1, len(sizes) - 2))]
        high = sizes[min(max(place, 1), len(sizes) - 1)]
        spread = high.patches - low.patches
        slope = (high.seconds - low.seconds) / spread if spread else math.inf
        slope = min(max(slope, 0.0), low.seconds / low.patches)  # neither end of the line may be below zero
        return max(0.0, low.seconds + slope * (patches - low.patches))

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
        """Seconds of a job drawn alone, whose evaluations together have so many patches."""
        return self.begin + sum(map(self.evaluation, costs)) + pictures * (self.decode or 0.0)


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

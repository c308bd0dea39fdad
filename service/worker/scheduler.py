"""Which pictures take part in the next evaluation; counts patches, touches no tensor.

Two parts. **A guaranteed one**: in every step each waiting picture is credited its weight's share of a tenth of a
step. Once its credit pays for the patches it wants, it is *owed* them, and those owed are served first, longest owed
first. **An urgent one**: what is left of the budget goes to deadlines that are near, nearest first, then by the least
work left in the job, less what its waiting has earned it. Least work alone keeps the mean wait short, but lets a long
job wait for every short one that comes; with age it outranks them, which keeps the longest waits short.

A picture of weight w that wants a share s of its model's budget is therefore served at least once every
``⌈s·W / (⅒·w)⌉ + N`` steps, where W is the weight of all N pictures in flight: whatever arrives meanwhile, however
short and urgent, cannot hold it back for longer. Guaranteed shares are of the model's own budget, so that a step of one
model counts as much as a step of another. Urgency counts patches, whatever their model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GUARANTEED = 0.1
"""Part of each step that is handed out by weight alone: more of it makes all jobs late together, at a quarter the
slowest in twenty by up to a tenth."""
AGEING = 0.5
"""What a patch evaluated while a job waits earns it, in patches of work. At 0 the longest waits grow under load; from
0.1 to 1 little changes, and beyond that the mean wait grows towards that of first come, first served."""
NEAR_SECONDS = 10.0
"""A deadline further off than this is no reason to let others wait."""
ROUNDING = 1e-9

Key = tuple[str, int]
"""(job id, index of the picture)."""


@dataclass(frozen=True)
class Candidate:
    """A picture that wants an evaluation of ``cost`` patches by ``model``."""

    key: Key
    model: str
    cost: int
    weight: float = 1.0
    """Of the picture: its job's, divided by how many pictures that still has."""
    remaining: float = 0.0
    """Work its job still needs, in patches divided by the job's weight; at most, for it may finish early."""
    waited: float = 0.0
    """Patches evaluated, whosever they were, since its job came, times the job's weight."""
    deadline: float | None = None
    """Seconds left until the job's deadline; None without one, or once it has passed."""
    alone: bool = False
    """Never packed with others."""


@dataclass
class _Account:
    credit: float = 0.0
    """In steps."""
    owed_since: int | None = None
    """The step in which the credit first paid for what is wanted."""


class Scheduler:
    """Packs evaluations: first who is owed one, then who is most urgent. One evaluation runs one model."""

    def __init__(self, budgets: Mapping[str, int]) -> None:
        """``budgets``: the most patches one evaluation of each model should have."""
        self.budgets = budgets
        self._accounts: dict[Key, _Account] = {}
        self._step = 0

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The next evaluation's pictures; at least one if there are candidates, however large it is."""
        waiting = list(candidates)
        self._step += 1
        self._credit(waiting)
        chosen = self._pack(sorted(waiting, key=self._rank))  # stable: equals keep their order of arrival
        for each in chosen:
            account = self._accounts[each.key]
            account.credit = max(0.0, account.credit - self._share(each))
            account.owed_since = None
        return chosen

    def _share(self, candidate: Candidate) -> float:
        return candidate.cost / self.budgets[candidate.model]

    def _credit(self, waiting: list[Candidate]) -> None:
        """Everyone's part of what is guaranteed; no more is saved up than the next evaluation costs."""
        self._accounts = {each.key: self._accounts.get(each.key) or _Account() for each in waiting}
        total = sum(each.weight for each in waiting)
        for each in waiting:
            account, share = self._accounts[each.key], self._share(each)
            account.credit = min(share, account.credit + GUARANTEED * each.weight / total)
            if account.owed_since is None and account.credit > share - ROUNDING:
                account.owed_since = self._step

    def _rank(self, candidate: Candidate) -> tuple[float, ...]:
        since = self._accounts[candidate.key].owed_since
        if since is not None:
            return 0, since
        near = candidate.deadline is not None and candidate.deadline <= NEAR_SECONDS
        urgency = candidate.remaining - AGEING * candidate.waited
        return 1, candidate.deadline if near and candidate.deadline is not None else math.inf, urgency

    def _pack(self, ranked: list[Candidate]) -> list[Candidate]:
        """The first, and of its model whoever else fits, in order."""
        if not ranked or ranked[0].alone:
            return ranked[:1]
        chosen: list[Candidate] = []
        left = self.budgets[ranked[0].model]
        for each in ranked:
            if not chosen or (each.model == ranked[0].model and not each.alone and each.cost <= left):
                chosen.append(each)
                left -= each.cost
        return chosen

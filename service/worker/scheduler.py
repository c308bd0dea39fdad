"""Chooses the pictures of the next evaluation. Counts patches, touches no tensor.

There are two rules. **The guaranteed share**: in every step, a tenth of the step is divided among all waiting pictures
by weight, and credited to them. As soon as a picture's credit pays for the patches it wants, it is *owed* them. Owed
pictures go first, longest owed first. **Urgency**: the rest of the budget goes to near deadlines, nearest first, and
then to the picture whose job has the least work left, minus a bonus for the time that it has waited. Least work first
keeps the mean wait short, but a long job would wait for every short one that arrives. With the bonus it overtakes them
at some point, which keeps the longest waits short.

So a picture of weight w that wants a share s of its model's budget is served at least once every `⌈s·W / (⅒·w)⌉ + N`
steps, where W is the weight of all N running pictures. No arrival can delay it further, however short or urgent.
Guaranteed shares refer to the model's own budget, so a step of one model counts as much as a step of another. Urgency
counts patches of any model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GUARANTEED = 0.1
"""Share of each step that is divided by weight alone. A larger one delays all jobs together: at a quarter, the slowest
five percent of jobs take up to a tenth longer."""
AGEING = 0.5
"""Bonus for each patch evaluated while a job waits, in patches of work. At 0, the longest waits grow under load. From
0.1 to 1, little changes. Above that, the mean wait approaches that of first come, first served."""
NEAR_SECONDS = 10.0
"""Deadlines further away than this do not count as urgent."""
ROUNDING = 1e-9

Key = tuple[str, int]
"""(job id, index of the picture)."""


@dataclass(frozen=True)
class Candidate:
    """A picture that wants an evaluation of `cost` patches by `model`."""

    key: Key
    model: str
    cost: int
    weight: float = 1.0
    """Weight of its job, divided by the number of the job's unfinished pictures."""
    remaining: float = 0.0
    """Upper bound of the job's remaining work, in patches divided by the job's weight. It may finish earlier."""
    waited: float = 0.0
    """Patches evaluated for any job since this one came, times the job's weight."""
    deadline: float | None = None
    """Seconds until the job's deadline; None if it has none, or it has passed."""
    alone: bool = False
    """Must not be packed with others."""


@dataclass
class _Account:
    credit: float = 0.0
    """In steps."""
    owed_since: int | None = None
    """The step in which the credit first paid for the picture's patches."""


class Scheduler:
    """Packs evaluations: pictures that are owed one first, then by urgency. One evaluation runs one model."""

    def __init__(self, budgets: Mapping[str, int], limits: Mapping[str, int] | None = None) -> None:
        """`budgets`: the most patches that one evaluation of each model should have. `limits`: the same for the next
        evaluation, if that changes.
        """
        self.budgets = budgets
        self._limits = budgets if limits is None else limits
        self._accounts: dict[Key, _Account] = {}
        self._step = 0

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return the pictures of the next evaluation: at least one if there are candidates, however large it is."""
        waiting = list(candidates)
        self._step += 1
        self._credit(waiting)
        chosen = self._pack(
            sorted(waiting, key=self._rank)
        )  # sorting is stable: equal ranks keep their order of arrival
        for each in chosen:
            account = self._accounts[each.key]
            account.credit = max(0.0, account.credit - self._share(each))
            account.owed_since = None
        return chosen

    def _share(self, candidate: Candidate) -> float:
        return candidate.cost / self.budgets[candidate.model]

    def _credit(self, waiting: list[Candidate]) -> None:
        """Add each picture's guaranteed share to its credit, up to the cost of its next evaluation."""
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
        """Return the first picture, and then all that fit with it and share its model."""
        if not ranked or ranked[0].alone:
            return ranked[:1]
        chosen: list[Candidate] = []
        left = self._limits[ranked[0].model]
        for each in ranked:
            if not chosen or (each.model == ranked[0].model and not each.alone and each.cost <= left):
                chosen.append(each)
                left -= each.cost
        return chosen

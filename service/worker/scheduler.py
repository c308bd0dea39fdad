"""Which pictures take part in the next evaluation; counts patches, touches no tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A picture that wants an evaluation of ``cost`` patches by ``model``."""

    key: tuple[str, int]
    """(job id, index of the picture)."""
    model: str
    cost: int


class Scheduler:
    """Serves pictures in turn: whoever was served longest ago comes first.

    One evaluation runs one model, that of the first in turn; other pictures of the same model join it, in
    order, while the patch budget lasts. So a long job cannot starve a short one (each picture gets one
    evaluation a turn) and a burst cannot starve a running job (newcomers queue behind it).
    """

    def __init__(self, patch_budget: int) -> None:
        self.patch_budget = patch_budget
        self._turns: dict[tuple[str, int], int] = {}
        self._turn = 0

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The next evaluation's pictures; at least one if there are candidates, however large it is."""
        waiting = list(candidates)
        known = {each.key for each in waiting}
        self._turns = {key: turn for key, turn in self._turns.items() if key in known}
        for each in waiting:
            self._turns.setdefault(each.key, self._turn)
        waiting.sort(key=lambda each: self._turns[each.key])  # stable: equal turns keep their order of arrival
        chosen: list[Candidate] = []
        budget = self.patch_budget
        for each in waiting:
            if chosen and (each.model != chosen[0].model or each.cost > budget):
                continue
            chosen.append(each)
            budget -= each.cost
        self._turn += 1
        self._turns.update((each.key, self._turn) for each in chosen)
        return chosen

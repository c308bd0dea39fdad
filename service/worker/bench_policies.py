"""What ours is measured against: how others batch, as choosers of the same engine."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from service.worker.scheduler import Candidate

MOST_PICTURES = 16
"""In one batch of a peer."""


class OneAtATime:
    """The oldest request alone, to its end."""

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        waiting = list(candidates)
        return [each for each in waiting if each.key[0] == waiting[0].key[0]]


class RequestLevel:
    """The oldest request and whatever equal ones wait with it, together to their end; who comes later waits."""

    def __init__(self, kinds: Mapping[str, Hashable]) -> None:
        """``kinds`` of jobs, by id: equal ones can share a batch."""
        self._kinds = kinds
        self._batch: set[tuple[str, int]] = set()

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        waiting = list(candidates)
        running = [each for each in waiting if each.key in self._batch]
        if not running and waiting:
            kind = self._kinds[waiting[0].key[0]]
            running = [each for each in waiting if self._kinds[each.key[0]] == kind][:MOST_PICTURES]
            self._batch = {each.key for each in running}
        return running


class StepLevel:
    """Equal requests join and leave a batch at every step; batches of different kinds take turns."""

    def __init__(self, kinds: Mapping[str, Hashable]) -> None:
        self._kinds = kinds
        self._turns: dict[Hashable, int] = {}
        self._step = 0

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        waiting = list(candidates)
        if not waiting:
            return []
        self._step += 1
        kind = min((self._kinds[each.key[0]] for each in waiting), key=lambda kind: self._turns.get(kind, 0))
        self._turns[kind] = self._step
        return [each for each in waiting if self._kinds[each.key[0]] == kind][:MOST_PICTURES]

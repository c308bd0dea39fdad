"""The ways to batch that ours is compared with, as choosers for the same engine."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from patchforge.service.worker.scheduler import Candidate

MAX_PICTURES = 16
"""Largest batch of these policies."""


class OneAtATime:
    """Runs the oldest request alone, to its end."""

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        waiting = list(candidates)
        return [candidate for candidate in waiting if candidate.key[0] == waiting[0].key[0]]


class RequestLevel:
    """Runs the oldest request with the waiting requests of its kind, to their end; later requests wait."""

    def __init__(self, kinds: Mapping[str, Hashable]) -> None:
        """`kinds` of jobs, by id; jobs of one kind can share a batch."""
        self._kinds = kinds
        self._batch: set[tuple[str, int]] = set()

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        waiting = list(candidates)
        running = [candidate for candidate in waiting if candidate.key in self._batch]
        if not running and waiting:
            kind = self._kinds[waiting[0].key[0]]
            running = _of_kind(waiting, self._kinds, kind)
            self._batch = {candidate.key for candidate in running}
        return running


class StepLevel:
    """Requests of one kind join and leave a batch at every step; the batches of different kinds take turns."""

    def __init__(self, kinds: Mapping[str, Hashable]) -> None:
        self._kinds = kinds
        self._turns: dict[Hashable, int] = {}
        self._step = 0

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        waiting = list(candidates)
        if not waiting:
            return []
        self._step += 1
        kinds = (self._kinds[candidate.key[0]] for candidate in waiting)
        kind = min(kinds, key=lambda kind: self._turns.get(kind, 0))
        self._turns[kind] = self._step
        return _of_kind(waiting, self._kinds, kind)


def _of_kind(waiting: list[Candidate], kinds: Mapping[str, Hashable], kind: Hashable) -> list[Candidate]:
    return [candidate for candidate in waiting if kinds[candidate.key[0]] == kind][:MAX_PICTURES]

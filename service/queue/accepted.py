"""Finds accepted jobs that a failover lost: docs/queue.md, "Which server is the master", says how that can happen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection

KEPT_SECONDS = 30.0  # longer than Sentinels take to tell everybody of a new master
MOST = 10_000
LOOKS = 5  # after a failover: for a moment, connections to the old master may still accept jobs


class Accepted:
    """The jobs that this process accepted a moment ago. Ask once a second or so."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[float, str]] = deque(maxlen=MOST)
        self._history: str | None = None
        self._looks = 0

    def note(self, job_id: str) -> None:
        self._jobs.append((time.monotonic(), job_id))

    def doubtful(self, history: str) -> list[str]:
        """Returns the jobs that must be looked for, now that the server's data has this history.

        A server has another history (its `master_replid`) if it has become the master, or was started again. Jobs are
        forgotten `KEPT_SECONDS` after they were accepted, but not while the server is away and nobody asks.
        """
        if self._history not in (None, history):
            self._looks = LOOKS
        self._history = history
        if self._looks:
            return [job_id for _, job_id in self._jobs]
        old = time.monotonic() - KEPT_SECONDS
        while self._jobs and self._jobs[0][0] < old:
            self._jobs.popleft()
        return []

    def looked(self, lost: Collection[str]) -> None:
        """Call it when the doubtful ones have been looked for."""
        self._looks -= 1
        self._jobs = deque((each for each in self._jobs if each[1] not in lost), MOST)

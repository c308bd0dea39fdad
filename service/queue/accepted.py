"""Finds accepted jobs that a failover lost: docs/queue.md, "Which server is the master", says how that can happen."""

from __future__ import annotations

import time
from collections.abc import Collection

KEPT_SECONDS = 30.0  # longer than Sentinels take to tell everybody of a new master
MOST = 10_000
LOOKS = 5  # after a failover: for a moment, connections to the old master may still accept jobs


class Accepted:
    """The jobs that this process accepted a moment ago. Ask once a second or so."""

    def __init__(self, longest: float) -> None:
        """`longest`: seconds after which a job may have ended and expired, so that nothing follows if it is gone."""
        self._longest = longest
        self._jobs: dict[str, float] = {}
        self._history: str | None = None
        self._looks = 0

    def note(self, job_id: str) -> None:
        if job_id not in self._jobs:  # a repeated key finds the job again
            self._jobs[job_id] = time.monotonic()
            if len(self._jobs) > MOST:
                del self._jobs[next(iter(self._jobs))]

    def doubtful(self, history: str) -> list[str]:
        """Returns the jobs that must be looked for, now that the server's data has this history.

        A server has another history (its `master_replid`) if it has become the master, or was started again. Jobs are
        forgotten `KEPT_SECONDS` after they were accepted, but not while the server is away and nobody asks.
        """
        if self._history not in (None, history):
            self._looks = LOOKS
        self._history = history
        kept = self._longest if self._looks else min(KEPT_SECONDS, self._longest)
        old = time.monotonic() - kept
        self._jobs = {job_id: at for job_id, at in self._jobs.items() if at >= old}
        return list(self._jobs) if self._looks else []

    def looked(self, lost: Collection[str]) -> None:
        """Call it when the doubtful ones have been looked for."""
        self._looks -= 1
        for job_id in lost:
            self._jobs.pop(job_id, None)

"""Ids of jobs, files and batches: ULIDs whose first character is the number of the queue server that has them.

The first character of a ULID is 0 until the year 3084. So these ids still sort by time on each server, are valid ULIDs,
and those from before there were several servers belong to the first one.
"""

from __future__ import annotations

from ulid import ULID

MOST_SERVERS = 8  # the first character of a valid ULID is at most 7


def new_id(server: int) -> str:
    """Returns a new id of what is on this queue server; the first one has the number 0."""
    return f"{server}{str(ULID())[1:]}"


def server_of(name: str) -> int:
    """Returns the number of the queue server on which a job, file or batch is; -1 if there can be none."""
    return int(name[0]) if name[:1] in set("01234567") else -1

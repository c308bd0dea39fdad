"""The job queue on Redis Streams: every atomic step is in `queue.lua`; docs/queue.md explains it."""

from patchforge.service.queue.claims import Claim, Heartbeat
from patchforge.service.queue.job_queue import JobQueue

__all__ = ["Claim", "Heartbeat", "JobQueue"]

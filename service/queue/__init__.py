"""The job queue on Redis Streams: every atomic step is in `queue.lua`; docs/queue.md explains it."""

from patchforge.service.queue.claims import Claim, Heartbeat
from patchforge.service.queue.job_queue import Backlog, JobQueue
from patchforge.service.queue.sharded import GatewayQueue, ShardedQueue, connect, connect_all

__all__ = ["Backlog", "Claim", "GatewayQueue", "Heartbeat", "JobQueue", "ShardedQueue", "connect", "connect_all"]

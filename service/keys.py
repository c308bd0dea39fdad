"""Every Redis key Patchforge uses, all under the one hash tag ``{patchforge}``.

A Redis Cluster runs a script only if all keys it touches live in one slot, and the slot is computed from the part in
braces. Admission, claiming and finishing each touch the job, its queue and the shared waiting list at once, so a tag
per job would not do: the whole queue shares one slot. That caps it at one Redis node, which moves a few thousand jobs
a second, orders of magnitude more than the GPUs behind it. Our client follows no redirections of a Cluster: the tag is
for a proxy in front of one that does.
"""

from __future__ import annotations

import hashlib

TAG = "{patchforge}"

JOB = f"{TAG}:job:"  # + job id: hash, the job's record
EVENTS = f"{TAG}:events:"  # + job id: stream of what happened to it
IMAGES = f"{TAG}:images:"  # + job id: hash, index → encoded picture
SOURCES = f"{TAG}:sources:"  # + job id: hash, the picture a job starts from and its mask
QUEUE = f"{TAG}:queue:"  # + class:model: stream of job ids, read through GROUP
IDEMPOTENCY = f"{TAG}:idempotency:"  # + digest: hash, job id and fingerprint of its request
RATE = f"{TAG}:rate:"  # + tenant: hash, pictures it may ask for now, and when that was reckoned
IN_FLIGHT = f"{TAG}:flying:"  # + tenant: set, ids of its waiting and running jobs, where these are limited
WORKER_MODELS = f"{TAG}:models:"  # + worker id: JSON list of model cards, short-lived
WORKER_METRICS = f"{TAG}:metrics:"  # + worker id: Prometheus exposition, short-lived
TAKEN = f"{TAG}:taken:"  # + worker id: hash, the job it took last and the token it asked with
WORKERS = f"{TAG}:workers"  # sorted set: worker id by the time its announcement ends
WAITING = f"{TAG}:waiting"  # sorted set: "id:model" of every waiting job by its deadline
DEAD_LETTERS = f"{TAG}:dead"  # stream: jobs given up after too many attempts
NEWS = f"{TAG}:news"  # pub/sub channel: id of a job that has a new event

GROUP = "workers"
CONSUMER = "workers"  # shared by all: owners are kept in the job's record, so dead ones leave no consumer behind
RETURNED = "returned"  # queue class, ahead of every priority: jobs a draining worker gave back


def job(job_id: str) -> str:
    return JOB + job_id


def events(job_id: str) -> str:
    return EVENTS + job_id


def images(job_id: str) -> str:
    return IMAGES + job_id


def sources(job_id: str) -> str:
    return SOURCES + job_id


def queue(model: str, priority: str) -> str:
    """The stream of one model and one priority (or ``RETURNED``)."""
    return f"{QUEUE}{priority}:{model}"


def idempotency(key: str, tenant: str | None = None) -> str:
    """One tenant's own; hashed, so that it can be of any length and content."""
    return IDEMPOTENCY + hashlib.sha256(f"{tenant or ''}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()


def worker_models(worker_id: str) -> str:
    return WORKER_MODELS + worker_id


def worker_metrics(worker_id: str) -> str:
    return WORKER_METRICS + worker_id

"""Every Redis key of Patchforge. All have the same hash tag, `{patchforge}`.

A Redis Cluster runs a script only if all its keys are in one slot, and computes the slot from the part in braces. To
accept, claim and finish a job each changes the job, its queue and the shared list of waiting jobs, so the whole queue
must be in one slot. That limits it to one Redis node; `sharded.py` uses several servers, each with a whole queue.
"""

from __future__ import annotations

import hashlib

TAG = "{patchforge}"

JOB = f"{TAG}:job:"  # + job id: hash, the job's record
EVENTS = f"{TAG}:events:"  # + job id: stream, the job's events
IMAGES = f"{TAG}:images:"  # + job id: hash, index → encoded picture
SOURCES = f"{TAG}:sources:"  # + job id: hash, the picture that an edit starts from, and its mask
QUEUE = f"{TAG}:queue:"  # + class:model: stream of job ids, read through GROUP
STREAMS = f"{TAG}:streams"  # set: every stream of QUEUE that ever had a job
IDEMPOTENCY = f"{TAG}:idempotency:"  # + digest: hash, job id and fingerprint of its request
RATE = f"{TAG}:rate:"  # + tenant: hash, pictures it may request now, and when that was computed
IN_FLIGHT = f"{TAG}:flying:"  # + tenant: set, ids of its waiting and running jobs; only if these are limited
WORKER_MODELS = f"{TAG}:models:"  # + worker id: JSON list of model cards, expires soon
ANNOUNCEMENT = f"{TAG}:announcement:"  # + worker id: JSON, the worker's protocol and capabilities, expires soon
WORKER_METRICS = f"{TAG}:metrics:"  # + worker id: Prometheus exposition, expires soon
TAKEN = f"{TAG}:taken:"  # + worker id: hash, the last job it claimed, and the token of that call
BELL = f"{TAG}:bell:"  # + model, after SPECIAL for special jobs: list, an item for each job that may wait; expires soon
CALL = f"{TAG}:call:"  # + worker id: list, an item if a job of this worker was cancelled; expires soon
LOOKED = f"{TAG}:looked"  # hash: queue stream → when someone last looked for jobs of silent workers
FLEET = f"{TAG}:fleet"  # string: version of what the workers announce
CHANGES = f"{TAG}:changes"  # sorted set: worker ids by the version in which their announcement last changed
WORKERS = f"{TAG}:workers"  # sorted set: worker ids by the time their announcement expires
SERVER = f"{TAG}:server"  # string: which of several queue servers this is, from 0
WAITING = f"{TAG}:waiting"  # sorted set: "id:model" of every waiting job, by deadline
RESERVED = f"{TAG}:reserved"  # hash: key of a job, batch or file → bytes it may still come to hold; `total`
RESERVED_UNTIL = f"{TAG}:reserved-until"  # sorted set: those keys, by the time to look whether they have ended
REMEMBERED = f"{TAG}:remembered"  # sorted set: names of models that workers serve or served, by when they are forgotten
REMEMBERED_MODEL = f"{TAG}:remembered:"  # + model: hash, its card and what its worker can do, expires
DEAD_LETTERS = f"{TAG}:dead"  # stream: jobs given up after too many attempts
FILE = f"{TAG}:file:"  # + file id: hash, what is known of a file of batches
FILE_LINES = f"{TAG}:file-lines:"  # + file id: list, the lines of a file; or hash, where they are: see `chunks.py`
FILE_USERS = f"{TAG}:file-users:"  # + file id: set, batches that need its lines in the object store
FILES_OF = f"{TAG}:files-of:"  # + tenant: sorted set, ids of its files by time
BATCH = f"{TAG}:batch:"  # + batch id: hash, the batch's record
BATCH_INPUT = f"{TAG}:batch-input:"  # + batch id: list, its lines; or hash, where they are
BATCH_RESULTS = f"{TAG}:batch-results:"  # + batch id: hash, line → outcome, and JSON that says more
BATCH_FLYING = f"{TAG}:batch-flying:"  # + batch id: hash, line → id of its job, which has not been seen to end
BATCH_NAMES = f"{TAG}:batch-names:"  # + batch id: set, the custom_ids of its settled lines
BATCHES_OF = f"{TAG}:batches-of:"  # + tenant: sorted set, ids of its batches by time
BATCHES_OPEN_OF = f"{TAG}:batches-open-of:"  # + tenant: set, ids of its batches that have not ended
BATCHES_OPEN = f"{TAG}:batches-open"  # sorted set: ids of all batches that have not ended, by time
BATCH_JOBS = f"{TAG}:batch-jobs"  # set: ids of the jobs of all batches that have not been seen to end
BATCH_LEADER = f"{TAG}:batch-feeder"  # string: the gateway that feeds batches, expires soon; not that of old versions
NEWS = f"{TAG}:news"  # pub/sub channel: id of a job that has a new event; or FLEET_NEWS
FLEET_NEWS = "fleet"  # on NEWS: FLEET has changed. No id of a job is like it, so earlier versions ignore it

GROUP = "workers"
CONSUMER = "workers"  # shared by all workers: the job's record names its owner, so dead workers leave no consumers
SPECIAL = "special-"  # before a queue class: jobs that not every worker can run
REFERRED = "@"  # before a field of IMAGES or SOURCES that has a reference to an object: who knows none finds nothing
RETURNED = "returned"  # queue class before all priorities: jobs that a draining worker gave back


def job(job_id: str) -> str:
    return JOB + job_id


def events(job_id: str) -> str:
    return EVENTS + job_id


def images(job_id: str) -> str:
    return IMAGES + job_id


def sources(job_id: str) -> str:
    return SOURCES + job_id


def queue(model: str, priority: str, *, special: bool = False) -> str:
    """Returns the stream of one model and one priority, or of `RETURNED`."""
    return f"{QUEUE}{SPECIAL if special else ''}{priority}:{model}"


def bell(model: str, *, special: bool = False, pin: str | None = None) -> str:
    """Returns the list that wakes a worker for a job of a model. `pin`: the job's need for one bundle."""
    return f"{BELL}{SPECIAL if special else ''}{'' if pin is None else f'{pin}:'}{model}"


def call(worker_id: str) -> str:
    return CALL + worker_id


def is_returned(stream: str) -> bool:
    """Tells whether a queue's stream holds jobs that were given back."""
    return stream.removeprefix(QUEUE).removeprefix(SPECIAL).startswith(f"{RETURNED}:")


def idempotency(key: str, tenant: str | None = None) -> str:
    """Returns a key of this tenant only. It is hashed, so `key` may have any length and content."""
    return IDEMPOTENCY + hashlib.sha256(f"{tenant or ''}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()


def worker_models(worker_id: str) -> str:
    return WORKER_MODELS + worker_id


def announcement(worker_id: str) -> str:
    return ANNOUNCEMENT + worker_id


def worker_metrics(worker_id: str) -> str:
    return WORKER_METRICS + worker_id

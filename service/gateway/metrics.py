"""The Prometheus metrics of a gateway: its responses, and the queue behind it."""

from __future__ import annotations

import math
from collections import Counter as Counts
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from patchforge.service.gateway.expositions import merge_expositions
from patchforge.service.logs import DROPPED
from patchforge.service.messages.batches import ENDINGS, LINE_OUTCOMES, OPEN
from patchforge.service.messages.schemas import Job
from patchforge.service.metrics import BY_REQUEST, OTHER, SECONDS, request_labels
from patchforge.service.queue.connection import Memory

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(frozen=True)
class ServerState:
    """One queue server at one scrape."""

    memory: Memory
    replicas: int
    """Replicas that follow it."""
    unreplicated_bytes: int
    """What the nearest of them has not confirmed."""


@dataclass(frozen=True)
class QueueState:
    """The shared queue and its workers at one scrape."""

    waiting: Mapping[str, int]
    """Waiting requests by model; models without any are left out."""
    held: Mapping[str, int]
    """Requests that a worker holds, dead or alive, by model; models without any are left out."""
    oldest_seconds: Mapping[str, float]
    """How long the oldest of them has waited, by model, on the queue server's clock."""
    workers: Collection[Collection[tuple[str, str | None]]]
    """For each live worker, name and digest of the models it serves; older workers tell no digest."""
    asleep: Collection[str]
    """Models that no live worker serves, but are accepted: see PATCHFORGE_REMEMBER_SECONDS."""
    batches: Mapping[str, int]
    """Batches that have not ended, by status; statuses without any are left out."""
    servers: Sequence[ServerState | None]
    """The queue servers, in their order; None for one that is away."""


class GatewayMetrics:
    """Counts a gateway's responses and shows the queue, in a Prometheus registry."""

    def __init__(self, registry: CollectorRegistry, max_waiting: int, servers: int = 1) -> None:
        """`max_waiting`: the number of waiting jobs at which submits are refused. `servers`: how many there are."""
        self._registry = registry
        self._servers = servers
        ProcessCollector(registry=registry)
        registry.register(DROPPED)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"patchforge_{name}", what, labels, registry=registry)

        self._queue_up = gauge("queue_up", "1 if a queue server answered this scrape, else 0.", "server")
        gauge("queue_capacity", "Number of waiting requests at which new ones are refused.").set(max_waiting)
        self._memory = gauge("queue_memory_bytes", "Memory that a queue server uses.", "server")
        self._memory_limit = gauge(
            "queue_memory_limit_bytes", "Memory that a queue server may use; 0 = no limit.", "server"
        )
        self._reserved = gauge("queue_reserved_bytes", "Memory that accepted requests may yet come to need.", "server")
        self._admission_limit = gauge(
            "queue_admission_limit_bytes",
            "Used and reserved memory beyond which requests are refused; 0 = no limit.",
            "server",
        )
        self._replicas = gauge("queue_replicas", "Replicas that follow a queue server.", "server")
        self._unreplicated = gauge("queue_unreplicated_bytes", "What its nearest replica has not confirmed.", "server")
        self._waiting = gauge("requests_waiting", "Accepted requests that no worker has started.", "model")
        self._held = gauge(
            "requests_held", "Requests that a worker has started and not ended, whether it still lives or not.", "model"
        )
        self._oldest = gauge(
            "queue_oldest_seconds", "Seconds that the oldest waiting request has waited, batches apart.", "model"
        )
        self._workers = gauge("workers", "Live workers.")
        self._of_queue_server = (
            self._memory,
            self._memory_limit,
            self._reserved,
            self._admission_limit,
            self._replicas,
            self._unreplicated,
        )
        self._model_workers = gauge("model_workers", "Live workers that serve a model.", "model")
        self._digests = gauge(
            "model_digests",
            "Different bundles that live workers serve under a model's name, as far as they tell.",
            "model",
        )
        self._asleep = gauge(
            "model_asleep", "1 if no worker serves a model, but requests for it are accepted and wait for one.", "model"
        )
        self._batches = gauge("batches_open", "Batches that have not ended, by status.", "status")
        self._batches_ended = Counter(
            "patchforge_batches", "Ended batches, by final status.", ("status",), registry=registry
        )
        self._batch_lines = Counter(
            "patchforge_batch_lines", "Ended requests of batches, by outcome.", ("outcome",), registry=registry
        )
        for status in ENDINGS:  # there from the start, so that rates see the first one
            self._batches_ended.labels(status)
        for outcome in LINE_OUTCOMES:
            self._batch_lines.labels(outcome)
        self._no_room = Counter(
            "patchforge_memory_refusals",
            "Requests, files and batches refused because the queue server might run out of memory.",
            registry=registry,
        )
        self._lost = Counter(
            "patchforge_jobs_lost",
            "Jobs accepted here that the queue server no longer had after a failover.",
            registry=registry,
        )
        self._ended = Counter(
            "patchforge_requests", "Ended requests, by final status.", (*BY_REQUEST, "status"), registry=registry
        )
        self._http = Counter(
            "patchforge_http_requests",
            "HTTP responses, by class of status code.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "patchforge_http_request_seconds",
            "Seconds until an HTTP response ended, streams included.",
            ("method", "route"),
            registry=registry,
            buckets=SECONDS,
        )
        self._rpc = Counter(
            "patchforge_grpc_requests", "Ended gRPC calls, by status code.", ("method", "status"), registry=registry
        )
        self._rpc_seconds = Histogram(
            "patchforge_grpc_request_seconds",
            "Seconds until a gRPC call ended, streams included.",
            ("method",),
            registry=registry,
            buckets=SECONDS,
        )

    def exposition(self, workers: Sequence[bytes] = ()) -> bytes:
        """Writes all metrics in Prometheus's text format, merged with `workers`, the texts of live workers."""
        return merge_expositions([generate_latest(self._registry), *workers])

    def set_queue_state(self, state: QueueState | None) -> None:
        """Updates the queue's gauges; call it at each scrape.

        None means that no queue server answers. The gauges of one that does not become NaN.
        """
        by_model = self._waiting, self._held, self._oldest, self._model_workers, self._digests, self._asleep
        for labelled in (*by_model, self._batches):
            labelled.clear()
        for number, server in enumerate([None] * self._servers if state is None else state.servers):
            self._set_server_state(str(number), server)
        if state is None:
            self._workers.set(math.nan)
            return
        self._workers.set(len(state.workers))
        for status in OPEN:
            self._batches.labels(status).set(state.batches.get(status, 0))
        served = Counts(model for models in state.workers for model, _ in models)
        bundles = {bundle for models in state.workers for bundle in models}
        digests = Counts(model for model, digest in bundles if digest is not None)
        for model in {*served, *state.waiting, *state.held, *state.asleep}:
            self._model_workers.labels(model).set(served[model])
            self._digests.labels(model).set(digests[model])
            self._asleep.labels(model).set(model in state.asleep)
            self._waiting.labels(model).set(state.waiting.get(model, 0))
            self._held.labels(model).set(state.held.get(model, 0))
            self._oldest.labels(model).set(state.oldest_seconds.get(model, 0))

    def _set_server_state(self, number: str, state: ServerState | None) -> None:
        self._queue_up.labels(number).set(state is not None)
        values = [math.nan] * len(self._of_queue_server)
        if state is not None:
            memory = state.memory
            values = [memory.used, memory.limit, memory.reserved, memory.admission_limit]
            values += [state.replicas, state.unreplicated_bytes]
        for gauge, value in zip(self._of_queue_server, values, strict=True):
            gauge.labels(number).set(value)

    def count_request_ended_in_queue(self, job: Job) -> None:
        """Counts a request that ended while no worker held it: see `JobQueue.on_ended`."""
        self._ended.labels(*request_labels(job), job.status.value).inc()

    def count_refusal_for_memory(self) -> None:
        """Counts a request, file or batch that was refused: see `JobQueue.on_no_room`."""
        self._no_room.inc()

    def count_lost_job(self) -> None:
        """Counts a job of `JobQueue.lost_jobs`."""
        self._lost.inc()

    def count_batch_line(self, outcome: str) -> None:
        """Counts a request of a batch that has `completed`, `failed`, or was `cancelled` or `refused`."""
        self._batch_lines.labels(outcome).inc()

    def count_batch(self, status: str) -> None:
        """Counts a batch that has ended."""
        self._batches_ended.labels(status).inc()

    def record_http_response(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Counts and times a response. `route` is the matched route's template, never the path; None without one."""
        method, route = method if method in _METHODS else OTHER, route or OTHER
        self._http.labels(method, route, f"{status // 100}xx").inc()
        self._http_seconds.labels(method, route).observe(seconds)

    def record_rpc_response(self, method: str, status: str, seconds: float) -> None:
        """Counts and times a call. `method` is its full name, `status` the name of a gRPC status code."""
        self._rpc.labels(method, status).inc()
        self._rpc_seconds.labels(method).observe(seconds)

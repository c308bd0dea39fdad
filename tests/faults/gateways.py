"""A gateway process, and what a client sees through it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from tests.patience import PATIENCE
from tests.processes import Process, eventually

TERMINAL = ("completed", "failed", "cancelled", "expired")
SHORT: dict[str, Any] = {"class_label": "cat", "seed": 7, "sampler": "euler", "steps": 4, "guidance": 2.0}
MEDIUM = SHORT | {"steps": 200, "n": 10}  # about one or two seconds of work
LONG = SHORT | {"steps": 200, "n": 4, "sampler": {"name": "dual_loop", "inner_steps": 16}}  # ten seconds or more


@dataclass(frozen=True)
class Seen:
    """One event as a client saw it."""

    id: str
    type: str
    data: dict[str, Any]


class Gateway(Process):
    """A gateway and a client's view through it."""

    def __init__(self, name: str, *command: str | Path, **variables: str) -> None:
        super().__init__(name, *command, **variables)
        self.url = self.grpc_address = ""

    def await_ports(self) -> None:
        line = self.wait_for("gateway is listening")
        self.url, self.grpc_address = line["http"], line["grpc"]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def close(self) -> None:
        if self.url:
            self.http.close()
        super().close()

    def await_ready(self) -> None:
        """Waits until `/readyz` answers that the gateway is ready."""
        eventually(lambda: self.ready().status_code == 200)

    def ready(self) -> httpx.Response:
        return self.http.get("/readyz")

    @contextmanager
    def grpc(self) -> Iterator[ImageServiceStub]:
        """A gRPC client."""
        with grpc.insecure_channel(self.grpc_address) as channel:
            yield ImageServiceStub(channel)

    def submit(self, body: dict[str, Any] | None = None, key: str | None = None, **changes: Any) -> str:
        """Submits `SHORT`, or `body`, with `changes`; returns the id of the accepted job."""
        key = key or str(uuid4())
        answer = patiently(lambda: self.post((body or SHORT) | changes, key))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def post(self, body: dict[str, Any], key: str | None = None, **options: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.http.post("/v1/jobs", json=body, headers=headers, **options)

    def job(self, job_id: str) -> dict[str, Any]:
        answer = patiently(lambda: self.http.get(f"/v1/jobs/{job_id}"))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def cancel(self, job_id: str) -> dict[str, Any]:
        answer = patiently(lambda: self.http.delete(f"/v1/jobs/{job_id}"))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def follow(self, job_id: str, after: str | None = None) -> Iterator[Seen]:
        """Yields the events of one SSE connection, which ends with the job, or when the gateway ends the stream."""
        headers = {} if after is None else {"Last-Event-ID": after}
        with self.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            assert answer.status_code in (200, 204), answer.read()
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name in ("id", "event", "data"):
                    event[name] = value
                elif not line and event:
                    yield Seen(event["id"], event["event"], json.loads(event["data"]))
                    event = {}

    def events(self, job_id: str) -> list[Seen]:
        """Returns all events of a job."""
        return list(self.stream(job_id))

    def stream(self, job_id: str) -> Iterator[Seen]:
        """Yields all events of a job, over any number of connections."""
        last: Seen | None = None
        give_up = time.monotonic() + PATIENCE
        while last is None or last.type not in TERMINAL:
            assert time.monotonic() < give_up, f"job {job_id} does not end; the last event is {last}"
            try:
                for event in self.follow(job_id, last.id if last else None):
                    last = event
                    yield event
            except (httpx.TransportError, AssertionError):
                time.sleep(0.1)  # like a browser before it reconnects

    def until(self, job_id: str, kind: str) -> Seen:
        """Waits for the first event of this kind."""
        events = self.follow(job_id)
        try:
            for event in events:
                if event.type == kind:
                    return event
        finally:
            events.close()  # type: ignore[attr-defined]
        raise AssertionError(f"job {job_id} ended without {kind!r}")

    def ended(self, job_id: str) -> dict[str, Any]:
        """Waits for a job's end, checks that it has exactly one terminal event, and returns the job."""
        ends = [event.type for event in self.events(job_id) if event.type in TERMINAL]
        job = self.job(job_id)
        assert ends == [job["status"]]
        return job

    def picture(self, job_id: str, index: int = 0) -> np.ndarray:
        answer = patiently(lambda: self.http.get(f"/v1/jobs/{job_id}/image", params={"index": index}))
        assert answer.status_code == 200, answer.text
        return np.asarray(Image.open(BytesIO(answer.content)).convert("RGB")).astype(int)

    def metric(self, name: str, *, workers: bool = True, **labels: str) -> float:
        """Returns the sum of all samples with this name and these labels, from the gateway and all workers."""
        exposition = self.http.get("/metrics", params={"workers": workers}).text
        families = text_string_to_metric_families(exposition)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def await_metric(self, value: float, name: str, **labels: str) -> None:
        """Waits until the metric has this value. Workers publish theirs every two seconds."""
        eventually(lambda: self.metric(name, **labels) == value, f"{name}{labels} to be {value}")


def patiently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """Repeats a call until the queue server answers in time, which takes several tries on a busy machine."""

    def heard() -> httpx.Response | None:
        answer = call()
        away = answer.status_code == 503 and answer.json()["code"] == "unavailable"
        return None if away else answer

    give_up = time.monotonic() + PATIENCE
    while (answer := heard()) is None:
        assert time.monotonic() < give_up, "the queue server cannot be reached"
    return answer

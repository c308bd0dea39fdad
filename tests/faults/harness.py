"""Real gateways, workers and a queue server to break: start them, follow their logs and jobs, hurt them.

Everything a test starts belongs to one ``Stack`` and dies with it, or with pytest. Nothing here sleeps to synchronise:
a test waits for a log line, an event of a job, or an answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

import grpc
import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service.embedded import EmbeddedServer
from service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds for anything that has to happen; the machine may be busy with other things
IDLE = 3.0  # seconds of silence after which a worker of the fixture `stack` is taken for dead
TERMINAL = ("completed", "failed", "cancelled", "expired")
SHORT: dict[str, Any] = {"class_label": "cat", "seed": 7, "sampler": "euler", "steps": 4, "guidance": 2.0}
MEDIUM = SHORT | {"steps": 200, "n": 10}  # a second of work or two
LONG = SHORT | {"steps": 200, "n": 4, "sampler": {"name": "dual_loop", "inner_steps": 16}}  # ten and more

# Ends with pytest, even one killed with -9: asks the kernel, then becomes the process to run.
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

T = TypeVar("T")
P = TypeVar("P", bound="Process")
Line = dict[str, Any]


class Process:
    """A process of the service and the structured log it writes."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.log: list[Line] = []
        self.stray: list[str] = []  # what is no JSON line: there should be nothing
        self._news = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-SEc", _LAUNCH, str(os.getpid()), sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def processor_seconds(self) -> float:
        """The time it has spent working, however busy the machine is with other things."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mark(self) -> int:
        """A place in the log, to wait only for what comes after it."""
        return len(self.log)

    def wait_for(self, event: str, *, after: int = 0, seconds: float = PATIENCE, **fields: Any) -> Line:
        """The first log line of this event and these fields; fails with the log if the process ends first."""

        def found() -> Line | None:
            wanted = {"event": event, **fields}
            return next((line for line in self.log[after:] if wanted.items() <= line.items()), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, seconds)
            line = found()
        if line is None:
            why = f"ended with {self._process.wait()}" if self._ended else f"is silent after {seconds:.0f} s"
            raise AssertionError(f"no {event!r} {fields or ''}: {self.name} {why}\n{self.transcript()}")
        return line

    def lines(self, event: str, **fields: Any) -> list[Line]:
        """All log lines so far of this event and these fields."""
        return [line for line in list(self.log) if {"event": event, **fields}.items() <= line.items()]

    def transcript(self) -> str:
        """The log, for a person."""
        return "\n".join([f"--- {self.name}", *map(json.dumps, list(self.log)), *self.stray])

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        self._process.kill()
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status, 0 if it shut down as it should."""
        self._process.terminate()
        return self.wait()

    def pause(self) -> None:
        """SIGSTOP; returns once it stands still."""
        stop(self.pid)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status, the log read to its end."""
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status

    def close(self) -> None:
        """Whatever its state, it is gone after this."""
        self._process.kill()
        self._process.wait()
        self._reader.join(10)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for text in stream:
                with self._news:
                    if text.startswith("{"):
                        self.log.append(json.loads(text))
                    else:
                        self.stray.append(text.rstrip())
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


@dataclass(frozen=True)
class Seen:
    """One event as a client saw it."""

    id: str
    type: str
    data: dict[str, Any]


class Gateway(Process):
    """A gateway and a client's view through it."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        super().__init__(name, arguments, environment)
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
        """Until `/readyz` says that requests are welcome."""
        eventually(lambda: self.ready().status_code == 200)

    def ready(self) -> httpx.Response:
        return self.http.get("/readyz")

    @contextmanager
    def grpc(self) -> Iterator[ImageServiceStub]:
        """A gRPC client."""
        with grpc.insecure_channel(self.grpc_address) as channel:
            yield ImageServiceStub(channel)

    def submit(self, body: dict[str, Any] | None = None, key: str | None = None, **changes: Any) -> str:
        """The id of an accepted job: ``SHORT``, or ``body``, with ``changes``."""
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
        """The events of one SSE connection; ends with the job, or when the gateway ends the stream."""
        headers = {} if after is None else {"Last-Event-ID": after}
        with self.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name in ("id", "event", "data"):
                    event[name] = value
                elif not line and event:
                    yield Seen(event["id"], event["event"], json.loads(event["data"]))
                    event = {}

    def events(self, job_id: str) -> list[Seen]:
        """All events of a job up to its end."""
        return list(self.stream(job_id))

    def stream(self, job_id: str) -> Iterator[Seen]:
        """The events of a job up to its end, over as many connections as it takes."""
        last: Seen | None = None
        give_up = time.monotonic() + PATIENCE
        while last is None or last.type not in TERMINAL:
            assert time.monotonic() < give_up, f"job {job_id} does not end; the last event is {last}"
            try:
                for event in self.follow(job_id, last.id if last else None):
                    last = event
                    yield event
            except (httpx.TransportError, AssertionError):
                time.sleep(0.1)  # as a browser would, before it connects anew

    def until(self, job_id: str, kind: str) -> Seen:
        """The first event of this kind, as soon as it is there."""
        events = self.follow(job_id)
        try:
            for event in events:
                if event.type == kind:
                    return event
        finally:
            events.close()  # type: ignore[attr-defined]
        raise AssertionError(f"job {job_id} ended without {kind!r}")

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job once it has ended, which its events must tell exactly once."""
        ends = [event.type for event in self.events(job_id) if event.type in TERMINAL]
        job = self.job(job_id)
        assert ends == [job["status"]]
        return job

    def picture(self, job_id: str, index: int = 0) -> np.ndarray:
        answer = patiently(lambda: self.http.get(f"/v1/jobs/{job_id}/image", params={"index": index}))
        assert answer.status_code == 200, answer.text
        return np.asarray(Image.open(BytesIO(answer.content)).convert("RGB")).astype(int)

    def metric(self, name: str, *, workers: bool = True, **labels: str) -> float:
        """The sum of the samples of this name and these labels, of the gateway and, if wanted, of all workers."""
        exposition = self.http.get("/metrics", params={"workers": workers}).text
        families = text_string_to_metric_families(exposition)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def await_metric(self, value: float, name: str, **labels: str) -> None:
        """Until the metric has this value; workers publish theirs every two seconds."""
        eventually(lambda: self.metric(name, **labels) == value, f"{name}{labels} to be {value}")


class Stack:
    """A queue server and the processes around it. Starts empty; ``start_…`` adds to it; leaving ends them all."""

    def __init__(self, data: Path, bundles: Path, **settings: Any) -> None:
        """``settings`` are for every process, named as in ``service.settings``."""
        self.server = EmbeddedServer(data)
        self.curtain = data / "curtain"
        self._bundles = bundles
        self._settings = settings
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()
            print(process.transcript())  # pytest shows it if the test failed
        if self.server.running:
            os.kill(self.server.pid, signal.SIGCONT)  # in case it was left paused
        self.server.stop()

    @property
    def redis(self) -> Redis:
        """A plain client, to look and to break things."""
        return Redis.from_url(self.server.url, socket_timeout=PATIENCE)

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Jobs on a `held_device` stand still once they have shown a preview, and go on afterwards."""
        self.curtain.touch()
        try:
            yield
        finally:
            self.curtain.unlink()

    def kill_server(self) -> None:
        """SIGKILL; ``server.start()`` brings it back on the same port with what its log holds."""
        self.server.kill()
        self.server.stop()

    def start_gateway(self, script: str | None = None, **settings: Any) -> Gateway:
        """Returns once its ports are open; it is ready when a worker is."""
        gateway = self._launch(Gateway, "gateway", script, settings)
        gateway.await_ports()
        return gateway

    def launch_worker(self, script: str | None = None, **settings: Any) -> Process:
        """Returns at once; ``script`` is a module of tests/faults that alters a thing or two and then runs the cli."""
        return self._launch(Process, "worker", script, settings)

    def start_worker(self, script: str | None = None, **settings: Any) -> Process:
        """Returns once it takes jobs."""
        worker = self.launch_worker(script, **settings)
        worker.wait_for("worker ready")
        return worker

    def start_pair(self, script: str | None = None, **settings: Any) -> tuple[Gateway, Process]:
        """A gateway and a worker, ready for requests."""
        worker = self.launch_worker(script, **settings)
        gateway = self.start_gateway(None, **settings)
        worker.wait_for("worker ready")
        gateway.await_ready()
        return gateway, worker

    def start_serve(self, data: Path, **settings: Any) -> Gateway:
        """`patchforge serve`, with a queue server and a worker of its own."""
        gateway = self._launch(Gateway, "serve", None, {**settings, "data_dir": data, "redis_url": None})
        gateway.await_ports()
        gateway.await_ready()
        return gateway

    def _launch(self, kind: type[P], role: str, script: str | None, settings: dict[str, Any]) -> P:
        arguments = ["-m", f"tests.faults.{script}" if script else "service.cli", role]
        process = kind(f"{role} {len(self._processes)}", arguments, self._environment(settings))
        self._processes.append(process)
        return process

    def _environment(self, settings: dict[str, Any]) -> dict[str, str]:
        known = {
            "http_port": 0,
            "grpc_port": 0,
            "worker_metrics_port": 0,
            "redis_url": self.server.url,
            "curtain": self.curtain,
            "bundle_dir": self._bundles,
            "models": ["tiny-class"],
            "threads": 1,
            "patch_budget": 4096,  # not profiled, which takes seconds and depends on what else the machine does
            "log_json": True,
            **self._settings,
            **settings,
        }
        ours = ("REDIS_URL", "PATCHFORGE_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        for name, value in known.items():
            if value is not None:
                environment[f"PATCHFORGE_{name.upper()}"] = json.dumps(value) if isinstance(value, list) else str(value)
        return environment | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def patiently(call: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer to a call that may be repeated; a queue server on a busy machine is not always heard in time."""

    def heard() -> httpx.Response | None:
        answer = call()
        away = answer.status_code == 503 and answer.json()["code"] == "unavailable"
        return None if away else answer

    give_up = time.monotonic() + PATIENCE
    while (answer := heard()) is None:
        assert time.monotonic() < give_up, "the queue server is away"
    return answer


def stop(pid: int) -> None:
    """SIGSTOP; returns once the process stands still."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: stopped(pid), f"{pid} to stop")


def stopped(pid: int) -> bool:
    """All its threads stand still."""
    states = [(task / "stat").read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) <= {"T", "t"}


def eventually(attempt: Callable[[], T], what: str = "it", seconds: float = PATIENCE) -> T:
    """The first true answer. For what no log line or event tells."""
    give_up = time.monotonic() + seconds
    while not (result := attempt()):
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return result

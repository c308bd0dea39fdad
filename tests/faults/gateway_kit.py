"""Tools for the gateway's rows: a gateway with a scripted worker, raw sockets, and checks of the gateway's health."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import openai
import pytest

from patchforge.service.queue import keys
from tests.faults.gateways import Gateway, Seen
from tests.faults.harness import Stack
from tests.faults.scripted_worker import CURTAIN, READ
from tests.patience import PATIENCE
from tests.processes import Process, eventually
from tests.service.gateway.harness import CARDS

APPLE: dict[str, Any] = {"prompt": "a red apple", "model": "tiny-text", "seed": 7}
NO_JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
JSON = {"Content-Type": "application/json"}


class Stage(Stack):
    """A queue server, a worker without a model, and one gateway ready for requests."""

    gateway: Gateway
    worker: Process

    def __init__(self, data: Path, **settings: Any) -> None:
        super().__init__(data, data, **settings)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.gateway, self.worker = self.start_pair("scripted_worker")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def jobs(self) -> list[str]:
        """Returns the ids of all jobs, including ended ones."""
        with self.redis as redis:
            return [key.decode().removeprefix(keys.JOB) for key in redis.keys(keys.JOB + "*")]

    def at_rest(self) -> None:
        """Waits for jobs that earlier tests left: they would run beside this test's jobs, and store their results."""
        played = {card.name.encode() for card in CARDS}
        with self.redis as redis:
            for job in self.jobs():
                status, model = redis.hmget(keys.job(job), "status", "model")
                if status in (b"waiting", b"running") and model in played:
                    self.gateway.ended(job)

    @contextmanager
    def served_by_nobody(self, name: str) -> Iterator[None]:
        """Announces a text model for which no worker takes jobs. The gateway knows it when the block begins."""
        card = CARDS[0].model_copy(update={"name": name})
        with self.redis as redis:
            redis.set(keys.worker_models(name), f"[{card.model_dump_json()}]")
            redis.zadd(keys.WORKERS, {name: "+inf"})
            redis.delete(keys.FLEET)  # gateways read all announcements anew, some time after they last asked
            try:
                eventually(lambda: self.gateway.http.get(f"/v1/models/{name}").status_code == 200)
                yield
            finally:
                redis.zrem(keys.WORKERS, name)
                redis.delete(keys.worker_models(name), keys.FLEET)

    def stored(self) -> set[bytes]:
        """Returns the keys of everything that callers have created."""
        with self.redis as redis:
            announced = (keys.WORKERS, keys.WORKER_MODELS, keys.ANNOUNCEMENT, keys.WORKER_METRICS)
            return {key for key in redis.scan_iter() if not key.decode().startswith(announced)}

    @contextmanager
    def another_gateway(self, **settings: Any) -> Iterator[Gateway]:
        """Runs one more gateway on the same queue inside the block."""
        gateway = self.start_gateway(**settings)
        try:
            gateway.await_ready()
            yield gateway
        finally:
            gateway.close()

    @contextmanager
    def curtain_down(self) -> Iterator[None]:
        """Jobs pause after their first preview until the block ends."""
        with self.redis as redis:
            redis.set(CURTAIN, 1)
            try:
                yield
            finally:
                redis.delete(CURTAIN)

    def read_attentively(self, gateway: Gateway, job: str) -> list[Seen]:
        """Returns all events of a flood, and tells the worker of each one read, because the worker waits for that."""
        seen = []
        with self.redis as redis:
            for event in gateway.stream(job):
                seen.append(event)
                if event.type == "preview":
                    redis.rpush(READ + job, event.id)
            redis.delete(READ + job)
        return seen


def openai_client(gateway: Gateway, api_key: str = "unused") -> openai.OpenAI:
    """The official client, as a context manager."""
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE)


def raw(gateway: Gateway, receive_buffer: int | None = None) -> socket.socket:
    """A plain connection to the HTTP port."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE)
    connection.connect((host, int(port)))
    return connection


def answer_to(gateway: Gateway, sent: bytes) -> bytes:
    """Sends these bytes, and returns everything that the gateway sends until it closes the connection."""
    with raw(gateway) as connection:
        connection.sendall(sent)
        return until_closed(connection)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(1 << 16):
        received += chunk
    return received


def post(path: str, body: bytes, *headers: str) -> bytes:
    """Builds a request that closes its connection."""
    head = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def problem_of(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def refusals(gateway: Gateway) -> float:
    """Counts its answers that blame the caller, over HTTP and gRPC, from its own metrics."""
    http = gateway.metric("patchforge_http_requests_total", workers=False, status="4xx")
    codes = ("INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
    rpc = (gateway.metric("patchforge_grpc_requests_total", workers=False, status=code) for code in codes)
    return http + sum(rpc)


def faults(gateway: Gateway) -> float:
    """Counts its answers that blame the server."""
    http = gateway.metric("patchforge_http_requests_total", workers=False, status="5xx")
    rpc = (gateway.metric("patchforge_grpc_requests_total", workers=False, status=code) for code in OUR_FAULT)
    return http + sum(rpc)


OUR_FAULT = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


def memory(pid: int, what: str = "VmRSS") -> float:
    """Returns the current resident memory in MiB, or with `VmHWM` its maximum."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{what}:")) / 1024


@contextmanager
def flat_memory(process: Process, allowed: float) -> Iterator[None]:
    """Fails if the process ever uses `allowed` MiB more than at the start."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # resets the maximum
    before = memory(process.pid)
    yield
    grown = memory(process.pid, "VmHWM") - before
    assert grown < allowed, f"{process.name} took {grown:.0f} MiB more"


@contextmanager
def unharmed(stage: Stage, gateway: Gateway | None = None, memory: float = 24, refused: int = 0) -> Iterator[Gateway]:
    """Whatever the block does, the gateway uses little memory, stores nothing, logs no error, and continues to work.

    An operator sees at least `refused` refusals, and no server error.
    """
    gateway = gateway or stage.gateway
    mark = gateway.mark()
    gateway.ended(gateway.submit(APPLE))  # the first job may need memory that stays in use
    stage.at_rest()
    before, refused_before, faults_before = stage.stored(), refusals(gateway), faults(gateway)
    with flat_memory(gateway, memory):
        yield gateway
    new = stage.stored() - before
    assert not new, new
    assert refusals(gateway) >= refused_before + refused
    assert faults(gateway) == faults_before
    assert not [line for line in gateway.log[mark:] if line["level"] == "error"]
    assert not [line for line in gateway.stray if "Traceback" in line or "Exception" in line]
    assert gateway.ended(gateway.submit(APPLE))["status"] == "completed"


def refusal(call: Any, request: Any, **options: Any) -> tuple[grpc.StatusCode, str | None]:
    """Returns the status that a call ends with, and the field that it names."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request, **options)
    return caught.value.code(), dict(caught.value.trailing_metadata() or ()).get("error-field")

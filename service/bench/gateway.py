"""What a gateway adds to a job: the way from a submit to a worker, jobs per second, and memory per watcher.

The gateway, the queue server and a worker that does nothing are real processes; only the model is missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from service.bench.noop_worker import CARD, DONE
from service.bench.raw_http import Connection
from service.embedded import EmbeddedServer, free_port, tied_to_us
from service.errors import Unavailable
from service.events import Preview
from service.queue import JobQueue
from service.settings import Settings
from service.soak.memory import resident

READY_SECONDS = 60.0
CLAIM_SECONDS = 60.0
BODY = json.dumps({"prompt": "nothing", "model": CARD.name, "seed": 1, "previews": False}).encode()
WATCHED = CARD.model_copy(update={"name": "watched"})
PREVIEWS, PREVIEW_BYTES = 20, 20_000  # to each watcher; one of 64×64 pixels as PNG takes 10 kB or so


@dataclass(frozen=True)
class Latency:
    """Milliseconds, half and nineteen of twenty below."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        ordered = sorted(seconds)
        return cls(*(1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95)))


@dataclass(frozen=True)
class Costs:
    """Milliseconds of processor time, which other load on the machine hardly changes."""

    gateway_ms: float
    queue_server_ms: float

    def less(self, before: Costs, jobs: int) -> Costs:
        """What each of ``jobs`` took since then."""
        share = 1 / max(1, jobs)
        gateway, queue_server = self.gateway_ms - before.gateway_ms, self.queue_server_ms - before.queue_server_ms
        return Costs(gateway * share, queue_server * share)


@dataclass(frozen=True)
class GatewayFigures:
    """Of one gateway."""

    submits: int
    accepted_ms: Latency
    """From sending a request to having its answer, one request at a time."""
    claimed_ms: Latency
    """From sending it to the worker having the job."""
    clients: int
    seconds: float
    jobs: int
    """Accepted, claimed and ended within these seconds, from so many clients at once."""
    jobs_per_second: float
    loaded_claimed_ms: Latency
    job_costs: Costs
    """Of each of these."""
    watchers: int
    watched_job_costs: Costs
    """Of a job whose events, ``PREVIEWS`` previews among them, someone reads as they come."""
    idle_mib: float
    watched_mib: float
    """The most memory it held while so many streams were open and each got its previews."""
    cpus: int
    load: float
    """Of the machine, before it began: with more than nothing, latencies and rates are too pessimistic."""


async def bench_gateway(folder: Path, submits: int, clients: int, seconds: float, watchers: int) -> GatewayFigures:
    """Starts everything on free ports and in ``folder``. Raises Unavailable if it does not come up."""
    load = os.getloadavg()[0]
    async with _Rig.running(folder) as rig:
        for _ in range(10):  # what is done for the first time takes longer
            await rig.one_by_one(10)
        accepted, claimed = await rig.one_by_one(submits)
        idle = resident(rig.pid)
        before = rig.costs()
        jobs, loaded = await rig.all_at_once(clients, seconds)
        between = rig.costs()
        watched = await rig.watched(watchers)
        after = rig.costs()
    return GatewayFigures(
        submits=submits,
        accepted_ms=Latency.of(accepted),
        claimed_ms=Latency.of(claimed),
        clients=clients,
        seconds=seconds,
        jobs=jobs,
        jobs_per_second=jobs / seconds,
        loaded_claimed_ms=Latency.of(loaded),
        job_costs=between.less(before, len(loaded)),
        watchers=watchers,
        watched_job_costs=after.less(between, watchers),
        idle_mib=idle / 2**20,
        watched_mib=watched / 2**20,
        cpus=os.cpu_count() or 1,
        load=load,
    )


class _Rig:
    """The processes, and what their worker tells."""

    def __init__(self, url: str, server: EmbeddedServer, pid: int, worker: asyncio.subprocess.Process) -> None:
        self.url, self.server, self.pid = url, server, pid
        self._worker = worker
        self._claims: dict[str, float] = {}
        self._news = asyncio.Condition()

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator[_Rig]:
        http, grpc = free_port(), free_port()
        with EmbeddedServer(folder) as server:
            settings = {"REDIS_URL": server.url, "HTTP_PORT": http, "GRPC_PORT": grpc, "MAX_WAITING": 1_000_000}
            settings |= {"RESULT_TTL_SECONDS": 60, "HOST": "127.0.0.1", "LOG_JSON": "true"}
            ours = {f"PATCHFORGE_{name}": str(value) for name, value in settings.items()}
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("PATCHFORGE_", "REDIS_URL"))} | ours
            async with AsyncExitStack() as stack:

                async def start(*arguments: str) -> asyncio.subprocess.Process:
                    log = stack.enter_context((folder / f"{arguments[-1]}.log").open("wb"))
                    command = tied_to_us([sys.executable, "-m", *arguments], signal.SIGKILL)
                    process = await asyncio.create_subprocess_exec(
                        *command, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                    )
                    stack.push_async_callback(_ended, process)
                    return process

                gateway = await start("service.cli", "gateway")
                worker = await start("service.bench.noop_worker")
                rig = cls(f"http://127.0.0.1:{http}", server, gateway.pid, worker)
                listening = asyncio.create_task(rig._listen())
                stack.callback(listening.cancel)
                await rig._ready()
                yield rig

    def costs(self) -> Costs:
        """So far."""
        return Costs(_processor_ms(self.pid), _processor_ms(self.server.pid))

    async def one_by_one(self, submits: int) -> tuple[list[float], list[float]]:
        """Seconds from each submit to its answer, and to its claim; the next one follows the claim."""
        accepted, claimed = [], []
        async with Connection(self.url) as connection:
            for _ in range(submits):
                began = time.monotonic()
                job = await _submit(connection, BODY)
                accepted.append(time.monotonic() - began)
                claimed.append(await self._claimed(job) - began)
        return accepted, claimed

    async def all_at_once(self, clients: int, seconds: float) -> tuple[int, list[float]]:
        """Jobs claimed within ``seconds`` from so many clients, and for every accepted one the seconds it took."""
        submitted: dict[str, float] = {}
        stop = time.monotonic() + seconds

        async def keep_submitting() -> None:
            async with Connection(self.url) as connection:
                while (began := time.monotonic()) < stop:
                    submitted[await _submit(connection, BODY)] = began

        await asyncio.gather(*(keep_submitting() for _ in range(clients)))
        claims = {job: await self._claimed(job) for job in submitted}
        took = [claims[job] - began for job, began in submitted.items()]
        return sum(claim < stop for claim in claims.values()), took

    async def watched(self, watchers: int) -> int:
        """The most bytes the gateway held while ``watchers`` clients each followed a job of their own to its end."""
        queue = JobQueue.connect(self.server.url, Settings(redis_url=self.server.url))
        most = 0
        async with AsyncExitStack() as stack:
            stack.push_async_callback(queue.close)
            await queue.announce("watched", [WATCHED])
            connections = []
            body = BODY.replace(CARD.name.encode(), WATCHED.name.encode(), 2).replace(b"false", b"true")
            for _ in range(watchers):
                connection = await stack.enter_async_context(Connection(self.url))
                await queue.announce("watched", [WATCHED])
                job = await _submit(connection, body)
                await connection.follow(f"/v1/jobs/{job}/events")
                connections.append(connection)
            most = max(most, resident(self.pid))
            reading = [asyncio.create_task(connection.until(b"event: completed")) for connection in connections]
            claims = [await queue.claim("bench", [WATCHED.name], block_seconds=0) for _ in range(watchers)]
            for evaluation in range(1, PREVIEWS + 1):
                for claim in filter(None, claims):
                    await queue.publish(claim, _preview(evaluation))
                most = max(most, resident(self.pid))
            for claim in filter(None, claims):
                await queue.finish(claim, DONE)
            await asyncio.gather(*reading)
            return max(most, resident(self.pid))

    async def _claimed(self, job: str) -> float:
        """When the worker had it, on the monotonic clock."""
        async with asyncio.timeout(CLAIM_SECONDS), self._news:
            await self._news.wait_for(lambda: job in self._claims)
        return self._claims[job]

    async def _listen(self) -> None:
        if self._worker.stdout is None:
            return
        async for line in self._worker.stdout:
            job, moment = line.split()
            async with self._news:
                self._claims[job.decode()] = float(moment)
                self._news.notify_all()

    async def _ready(self) -> None:
        give_up = time.monotonic() + READY_SECONDS
        while time.monotonic() < give_up:
            with suppress(OSError, EOFError):
                async with Connection(self.url) as connection:
                    if (await connection.get("/readyz"))[0] == 200:
                        return
            await asyncio.sleep(0.1)
        raise Unavailable(f"the gateway was not ready in {READY_SECONDS:.0f} s")


async def _submit(connection: Connection, body: bytes) -> str:
    status, answer = await connection.post("/v1/jobs", body)
    if status != 202:
        raise Unavailable(f"a submit was answered with {status}: {answer.decode(errors='replace')[:200]}")
    job: str = json.loads(answer)["id"]
    return job


def _processor_ms(pid: int) -> float:
    """Of a process, so far; 0 where there is no ``/proc``."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


async def _ended(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(TimeoutError):
        async with asyncio.timeout(15):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


def _preview(evaluation: int) -> Preview:
    return Preview(
        index=0,
        evaluation=evaluation,
        evaluations=PREVIEWS,
        times=[evaluation / PREVIEWS] * 64,
        finished_share=0.0,
        patch_evaluations=evaluation,
        dense_patch_evaluations=evaluation,
        b64_png="A" * PREVIEW_BYTES,
    )

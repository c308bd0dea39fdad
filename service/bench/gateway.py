"""Measures what a gateway costs: time from submit to claim, jobs per second, and memory per watcher.

Gateway, queue server and worker are real processes; only the model is missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from patchforge.service.bench.noop_worker import CARD, DONE
from patchforge.service.bench.processes import processes, wait_until_ready
from patchforge.service.bench.raw_http import Connection
from patchforge.service.embedded import EmbeddedServer, free_port
from patchforge.service.errors import Unavailable
from patchforge.service.messages.events import Preview
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings

CLAIM_SECONDS = 180.0
BODY = json.dumps({"prompt": "nothing", "model": CARD.name, "seed": 1, "previews": False}).encode()
WATCHED = CARD.model_copy(update={"name": "watched"})
PREVIEWS, PREVIEW_BYTES = 20, 20_000  # per watcher; a PNG of 64×64 pixels has about 10 kB


@dataclass(frozen=True)
class Latency:
    """Percentiles in milliseconds."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        ordered = sorted(seconds)
        return cls(*(1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95)))


@dataclass(frozen=True)
class Costs:
    """Milliseconds of processor time; other load on the machine hardly changes them."""

    gateway_ms: float
    queue_server_ms: float

    def per_job(self, before: Costs, jobs: int) -> Costs:
        """Costs per job since `before`, for `jobs` jobs."""
        share = 1 / max(1, jobs)
        gateway, queue_server = self.gateway_ms - before.gateway_ms, self.queue_server_ms - before.queue_server_ms
        return Costs(gateway * share, queue_server * share)


@dataclass(frozen=True)
class GatewayFigures:
    """Measurements of one gateway."""

    submits: int
    accepted_ms: Latency
    """From a request to its answer, one request at a time."""
    claimed_ms: Latency
    """From a request to the worker's claim."""
    clients: int
    seconds: float
    jobs: int
    """Claimed within `seconds`, from `clients` concurrent clients."""
    jobs_per_second: float
    loaded_claimed_ms: Latency
    job_costs: Costs
    """Costs of one such job."""
    watchers: int
    watched_job_costs: Costs
    """Costs of a job with `PREVIEWS` previews and one watcher."""
    idle_mib: float
    watched_mib: float
    """Peak memory while `watchers` streams were open and got their previews."""
    cpus: int
    load: float
    """Load of the machine before the run; above 0, latencies and rates are too pessimistic."""


async def bench_gateway(folder: Path, submits: int, clients: int, seconds: float, watchers: int) -> GatewayFigures:
    """Start everything in `folder` on free ports, and measure.

    Raises:
        Unavailable: the gateway was not ready in time, or refused a job.
    """
    load = os.getloadavg()[0]
    async with _Rig.running(folder) as rig:
        for _ in range(10):  # warm up
            await rig.submit_one_by_one(10)
        accepted, claimed = await rig.submit_one_by_one(submits)
        idle = rig.memory()
        before = rig.costs()
        jobs, loaded = await rig.submit_concurrently(clients, seconds)
        between = rig.costs()
        watched = await rig.measure_watchers(watchers)
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
        job_costs=between.per_job(before, len(loaded)),
        watchers=watchers,
        watched_job_costs=after.per_job(between, watchers),
        idle_mib=idle / 2**20,
        watched_mib=watched / 2**20,
        cpus=os.cpu_count() or 1,
        load=load,
    )


class _Rig:
    """The running processes, and the claim times that the worker prints."""

    def __init__(self, url: str, server: EmbeddedServer, pid: int, worker: asyncio.subprocess.Process) -> None:
        self.url, self.server, self.pid = url, server, pid
        self._worker = worker
        self._claims: dict[str, float] = {}
        self._changed = asyncio.Condition()

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator[_Rig]:
        http, grpc = free_port(), free_port()
        with EmbeddedServer(folder) as server:
            settings = {"REDIS_URL": server.url, "HTTP_PORT": http, "GRPC_PORT": grpc, "MAX_WAITING": 1_000_000}
            settings |= {"RESULT_TTL_SECONDS": 60, "HOST": "127.0.0.1", "LOG_JSON": "true"}
            async with processes(folder, settings) as start, AsyncExitStack() as stack:
                gateway = await start("patchforge", "gateway")
                worker = await start("patchforge.service.bench.noop_worker")
                rig = cls(f"http://127.0.0.1:{http}", server, gateway.pid, worker)
                listening = asyncio.create_task(rig._read_claims())
                stack.callback(listening.cancel)
                await wait_until_ready(rig.url)
                yield rig

    def costs(self) -> Costs:
        """Processor time since the processes started."""
        return Costs(processor_ms(self.pid), processor_ms(self.server.pid))

    def memory(self) -> int:
        """Resident bytes of the gateway."""
        return int(psutil.Process(self.pid).memory_info().rss)

    async def submit_one_by_one(self, submits: int) -> tuple[list[float], list[float]]:
        """Seconds from submit to answer and from submit to claim; the next submit follows the claim."""
        accepted, claimed = [], []
        async with Connection(self.url) as connection:
            for _ in range(submits):
                began = time.monotonic()
                job = await _submit_job(connection, BODY)
                accepted.append(time.monotonic() - began)
                claimed.append(await self._wait_for_claim(job) - began)
        return accepted, claimed

    async def submit_concurrently(self, clients: int, seconds: float) -> tuple[int, list[float]]:
        """Number of jobs claimed within `seconds`, and the seconds from submit to claim of all accepted jobs."""
        submitted: dict[str, float] = {}
        stop = time.monotonic() + seconds

        async def keep_submitting() -> None:
            async with Connection(self.url) as connection:
                while True:  # at least once, even if it is late by then
                    began = time.monotonic()
                    submitted[await _submit_job(connection, BODY)] = began
                    if time.monotonic() >= stop:
                        return

        await asyncio.gather(*(keep_submitting() for _ in range(clients)))
        claims = {job: await self._wait_for_claim(job) for job in submitted}
        took = [claims[job] - began for job, began in submitted.items()]
        return sum(claim < stop for claim in claims.values()), took

    async def measure_watchers(self, watchers: int) -> int:
        """Peak memory of the gateway in bytes while every watcher follows its own job to the end."""
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
                job = await _submit_job(connection, body)
                await connection.follow(f"/v1/jobs/{job}/events")
                connections.append(connection)
            most = max(most, self.memory())
            reading = [asyncio.create_task(connection.read_until(b"event: completed")) for connection in connections]
            claims = [await queue.claim("bench", [WATCHED.name], block_seconds=0) for _ in range(watchers)]
            for evaluation in range(1, PREVIEWS + 1):
                for claim in filter(None, claims):
                    await queue.publish(claim, _build_preview(evaluation))
                most = max(most, self.memory())
            for claim in filter(None, claims):
                await queue.finish(claim, DONE)
            await asyncio.gather(*reading)
            return max(most, self.memory())

    async def _wait_for_claim(self, job: str) -> float:
        """Time of the claim, on the monotonic clock."""
        async with asyncio.timeout(CLAIM_SECONDS), self._changed:
            await self._changed.wait_for(lambda: job in self._claims)
        return self._claims[job]

    async def _read_claims(self) -> None:
        if self._worker.stdout is None:
            return
        async for line in self._worker.stdout:
            job, moment = line.split()
            async with self._changed:
                self._claims[job.decode()] = float(moment)
                self._changed.notify_all()


async def _submit_job(connection: Connection, body: bytes) -> str:
    status, answer = await connection.post("/v1/jobs", body)
    if status != 202:
        raise Unavailable(f"the gateway refused a job with status {status}: {answer.decode(errors='replace')[:200]}")
    job: str = json.loads(answer)["id"]
    return job


def processor_ms(pid: int) -> float:
    """Processor time of a process since it started. Linux counts it in nanoseconds for each thread."""
    with suppress(OSError):
        tasks = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
        if tasks:
            return sum(int(each.read_text().split()[0]) for each in tasks) / 1e6
    times = psutil.Process(pid).cpu_times()
    return 1000 * (times.user + times.system)


def _build_preview(evaluation: int) -> Preview:
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

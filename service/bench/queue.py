"""Measures what a job costs the queue server, with a real gateway, a real worker and a real model.

Costs are processor time of the queue server, as it counts it itself: other load on the machine hardly changes them.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from redis.asyncio import Redis

from patchforge.service.bench.delay import Delay, delayed
from patchforge.service.bench.noop_worker import CARD, DONE
from patchforge.service.bench.processes import processes, wait_until_ready
from patchforge.service.bench.raw_http import Connection
from patchforge.service.embedded import EmbeddedServer, free_port
from patchforge.service.errors import Unavailable
from patchforge.service.gateway.acceptor import raise_file_limit
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings

PROMPT = "a red heart"
SETTLE_SECONDS = 2.0  # until what a phase left behind is done
REST_SECONDS = 3.0
FLEET_JOBS = 50


@dataclass(frozen=True)
class Usage:
    """What the queue server did since it started."""

    milliseconds: float
    """Processor time."""
    scripts: float
    """Scripts that it ran."""
    commands: float
    """Commands that it ran, those inside scripts included."""

    def since(self, before: Usage, share: float = 1.0) -> Usage:
        """What it did since `before`, times `share`."""
        return Usage(*(share * (now - then) for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True)
class QueueFigures:
    """Measurements of one queue server."""

    jobs: int
    clients: int
    plain: Usage
    """Per job without previews, answered in one call."""
    streamed: Usage
    """Per job with previews: submitted, watched by an event stream, its picture fetched."""
    rest: Usage
    """Per second with one gateway and one worker that have nothing to do."""
    fleet: int
    alone: Usage
    """Per job that a worker without a model claims and finishes, if it is the only one."""
    among: Usage
    """The same with `fleet` idle workers. What they cost while nothing happens is subtracted."""
    near_seconds: float
    """Median time of a call that draws a picture, one at a time."""
    round_trip: float
    """Seconds to the queue server and back."""
    far_seconds: float
    """The same time with that distance between the queue server and all others."""
    cpus: int
    load: float
    """Load of the machine before the run."""


async def bench_queue(folder: Path, model: str, jobs: int, clients: int, fleet: int, round_trip: float) -> QueueFigures:
    """Start everything in `folder` on free ports, and measure. `model` names a shipped bundle that takes prompts.

    Raises:
        Unavailable: the gateway was not ready in time, or refused a job.
    """
    load = os.getloadavg()[0]
    async with _Rig.running(folder, model) as rig:
        await rig.draw(clients, clients, rig.draw_plain)  # warm up
        await rig.draw(clients, clients, rig.draw_streamed)
        plain = await rig.measure(jobs, clients, rig.draw_plain)
        streamed = await rig.measure(jobs, clients, rig.draw_streamed)
        rest = await rig.measure_rest(REST_SECONDS)
        alone = await rig.measure_fleet(1)
        among = await rig.measure_fleet(fleet)
        near = await rig.time_calls(max(5, jobs // 4))
        rig.delay.round_trip = round_trip
        await rig.time_calls(2)
        far = await rig.time_calls(max(5, jobs // 4))
        rig.delay.round_trip = 0.0
    return QueueFigures(
        *(jobs, clients, plain, streamed, rest, fleet, alone, among, near, round_trip, far),
        cpus=os.cpu_count() or 1,
        load=load,
    )


class _Rig:
    """The running processes. Gateway and worker reach the queue server through `delay`."""

    def __init__(self, url: str, server: EmbeddedServer, delay: Delay, model: str) -> None:
        self.url, self.server, self.delay, self.model = url, server, delay, model
        self._redis: Redis = Redis.from_url(server.url)
        self._seed = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path, model: str) -> AsyncIterator[_Rig]:
        http, grpc = free_port(), free_port()
        with EmbeddedServer(folder) as server:
            async with delayed(urlsplit(server.url).port or 0) as delay:
                url = f"redis://127.0.0.1:{delay.port}/0"
                settings = {"REDIS_URL": url, "HTTP_PORT": http, "GRPC_PORT": grpc, "HOST": "127.0.0.1"}
                settings |= {"LOG_JSON": "true", "RESULT_TTL_SECONDS": 60, "WORKER_METRICS_PORT": 0, "THREADS": 1}
                settings |= {"MODELS": json.dumps([model])}
                settings |= {"PATCH_BUDGET": 4096}  # a profile takes long on a busy machine
                async with processes(folder, settings) as start, AsyncExitStack() as stack:
                    await start("patchforge", "gateway")
                    await start("patchforge", "worker")
                    rig = cls(f"http://127.0.0.1:{http}", server, delay, model)
                    stack.push_async_callback(rig._redis.aclose)
                    await wait_until_ready(rig.url)
                    yield rig

    async def usage(self) -> Usage:
        """What the queue server did so far."""
        cpu, stats = await self._redis.info("cpu"), await self._redis.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): int(each["calls"]) for name, each in stats.items()}
        scripts = sum(calls.get(name, 0) for name in ("eval", "evalsha"))
        return Usage(1000 * (cpu["used_cpu_user"] + cpu["used_cpu_sys"]), scripts, sum(calls.values()))

    async def measure(self, jobs: int, clients: int, draw: Callable[[Connection], Awaitable[None]]) -> Usage:
        """Usage per job, for so many jobs of so many concurrent clients."""
        await asyncio.sleep(SETTLE_SECONDS)
        before = await self.usage()
        await self.draw(jobs, clients, draw)
        return (await self.usage()).since(before, 1 / jobs)

    async def measure_rest(self, seconds: float) -> Usage:
        """Usage per second while nothing happens."""
        await asyncio.sleep(SETTLE_SECONDS)
        before, began = await self.usage(), time.monotonic()
        await asyncio.sleep(seconds)
        return (await self.usage()).since(before, 1 / (time.monotonic() - began))

    async def draw(self, jobs: int, clients: int, draw: Callable[[Connection], Awaitable[None]]) -> None:
        """Draw pictures with concurrent clients, each one job at a time."""
        left = iter(range(jobs))

        async def keep_drawing() -> None:
            async with Connection(self.url) as connection:
                for _ in left:
                    await draw(connection)

        await asyncio.gather(*(keep_drawing() for _ in range(clients)))

    async def draw_plain(self, connection: Connection) -> None:
        body = {"model": self.model, "prompt": PROMPT, "seed": self._next_seed(), "response_format": "b64_json"}
        status, answer = await connection.post("/v1/images/generations", json.dumps(body).encode())
        _require(status == 200, status, answer)

    async def draw_streamed(self, connection: Connection) -> None:
        body = {"model": self.model, "prompt": PROMPT, "seed": self._next_seed(), "previews": True}
        status, answer = await connection.post("/v1/jobs", json.dumps(body).encode())
        _require(status == 202, status, answer)
        job = json.loads(answer)["id"]
        async with Connection(self.url) as stream:
            await stream.follow(f"/v1/jobs/{job}/events")
            await stream.read_until(b"event: completed")
        status, answer = await connection.get(f"/v1/jobs/{job}/image")
        _require(status == 200, status, answer)

    async def time_calls(self, calls: int) -> float:
        """Median seconds of calls that draw a picture, one at a time."""
        took = []
        async with Connection(self.url) as connection:
            for _ in range(calls):
                began = time.monotonic()
                await self.draw_plain(connection)
                took.append(time.monotonic() - began)
        return statistics.median(took)

    async def measure_fleet(self, workers: int) -> Usage:
        """Usage per job that one of so many workers without a model claims and finishes; its idle part subtracted."""
        raise_file_limit()
        finished: asyncio.Queue[str] = asyncio.Queue()
        settings = Settings(redis_url=self.server.url)

        async def work(number: int) -> None:
            queue, name = JobQueue.connect(self.server.url, settings), f"idle-{number}"
            try:
                await queue.announce(name, [CARD])
                while True:
                    claim = await queue.claim(name, [CARD.name], block_seconds=3600)
                    if claim is not None and await queue.finish(claim, DONE):
                        finished.put_nowait(claim.job.id)
            finally:
                await queue.close()

        working = [asyncio.create_task(work(number)) for number in range(workers)]
        try:
            return await self._measure_jobs(workers, finished)
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    async def _measure_jobs(self, workers: int, finished: asyncio.Queue[str]) -> Usage:
        body = json.dumps({"model": CARD.name, "prompt": PROMPT, "seed": 1, "previews": False}).encode()
        await self._wait_for_idle(workers)
        idle = await self.measure_rest(REST_SECONDS)
        before, began = await self.usage(), time.monotonic()
        async with Connection(self.url) as connection:
            for _ in range(FLEET_JOBS):
                status, answer = await connection.post("/v1/jobs", body)
                _require(status == 202, status, answer)
                await finished.get()
        await asyncio.sleep(0.5)  # until all who woke for the last job wait again
        used, seconds = (await self.usage()).since(before), time.monotonic() - began
        resting = Usage(*(seconds * rate for rate in astuple(idle)))
        return used.since(resting, 1 / FLEET_JOBS)

    async def _wait_for_idle(self, workers: int) -> None:
        """Wait until most workers wait. They also look for jobs every second, so seldom do all of them wait at once."""
        blocked = 0
        while blocked < max(1, workers // 2):
            await asyncio.sleep(0.1)
            blocked = (await self._redis.info("clients"))["blocked_clients"]

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed


def _require(holds: bool, status: int, answer: bytes) -> None:
    if not holds:
        raise Unavailable(f"the gateway answered with status {status}: {answer.decode(errors='replace')[:200]}")

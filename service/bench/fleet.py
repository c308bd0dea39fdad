"""Measures a fleet: many workers without a model, real gateways, real queue servers, and clients that want pictures.

Costs are processor time, which other load on the machine changes less than rates and latencies. These hold for this
machine alone, because all parts share it.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from sys import executable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from patchforge.service.bench.gateway import BODY, Latency, processor_ms
from patchforge.service.bench.hosts import Hosts, hosts
from patchforge.service.bench.noop_worker import CARD
from patchforge.service.bench.processes import READY_SECONDS, launch, wait_until_ready
from patchforge.service.bench.raw_http import Connection
from patchforge.service.embedded import find_binary, free_port
from patchforge.service.errors import Unavailable
from patchforge.service.gateway.acceptor import raise_file_limit

PER_PROCESS = 50  # workers
REST_SECONDS = 5.0
LONE_SUBMITS = 60
PROBE_SECONDS = 0.1  # between two submits whose latency is measured beside the clients' load
SCRAPES = 3
MEMORY = "256mb"  # of each queue server


@dataclass(frozen=True)
class Size:
    """What runs."""

    workers: int
    gateways: int
    queue_servers: int


@dataclass(frozen=True)
class Costs:
    """Milliseconds of processor time of each part of the fleet, all its processes together."""

    queue_servers: float
    gateways: float
    workers: float

    def since(self, before: Costs, share: float = 1.0) -> Costs:
        """Costs since `before`, times `share`."""
        return Costs(*(share * (now - then) for now, then in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True)
class Scrapes:
    """`GET /metrics` of one gateway. All times in milliseconds."""

    seconds: float
    """Median time of a scrape, in seconds."""
    bytes: int
    stall_ms: float
    """Longest time that the same gateway took for `/healthz` meanwhile."""
    gateway_ms: float
    """Processor time that one takes, the health checks meanwhile included."""


@dataclass(frozen=True)
class FleetFigures:
    """Measurements of one fleet."""

    size: Size
    apart: bool
    """Whether each process had a network namespace of its own; otherwise all used the loopback address."""
    lone_submit_ms: Latency
    """From a request to its answer, one at a time, while all workers are idle."""
    lone_submit: Costs
    """Per such request, beyond what the fleet costs at rest; what idle workers do with the job is included."""
    floor: Costs
    """Per second without workers."""
    rest: Costs
    """Per second without any job."""
    clients: int
    seconds: float
    jobs: int
    """Completed within `seconds`, from `clients` concurrent clients."""
    submit_ms: Latency
    """From a request to its answer, meanwhile."""
    end_to_end_ms: Latency
    """From a request to its picture, meanwhile."""
    job: Costs
    """Per job, beyond what the fleet costs at rest."""
    quiet_ms: float
    """Longest time for `/healthz` without any other request."""
    own: Scrapes
    """The gateway's own metrics."""
    all: Scrapes
    """With those of all workers, added up."""
    cpus: int
    load: float
    """Load of the machine before the run."""

    @property
    def jobs_per_second(self) -> float:
        return self.jobs / self.seconds

    def carried_by_queue_core(self, workers: int) -> float:
        """Computed: jobs per second for one core of a queue server that `workers` workers of this fleet's kind use."""
        floor, rest = (each.queue_servers / self.size.queue_servers for each in (self.floor, self.rest))
        at_rest = floor + max(0.0, rest - floor) * workers / self.size.workers
        return max(0.0, 1000 - at_rest) / max(self.job.queue_servers, 1e-6)

    def carried_by_gateway_core(self) -> float:
        """Computed: jobs per second for one core of gateways, which hold one gateway each."""
        return max(0.0, 1000 - self.rest.gateways / self.size.gateways) / max(self.job.gateways, 1e-6)


async def bench_fleet(folder: Path, size: Size, clients: int, seconds: float, apart: bool | None) -> FleetFigures:
    """Start everything in `folder`, and measure. `apart`: see `hosts`.

    Raises:
        Unavailable: the fleet was not ready in time, or refused a job; or there are no namespaces here.
    """
    load = os.getloadavg()[0]
    raise_file_limit()
    with hosts(apart) as places:
        async with _Rig.running(folder, size, places) as rig:
            rest = await rig.measure_rest()
            before, began = rig.costs(), time.monotonic()
            lone = await rig.submit_one_by_one(LONE_SUBMITS)
            lone_submit = _beyond(rest, rig.costs().since(before), time.monotonic() - began, LONE_SUBMITS)
            submits, ends, jobs, used, took = await rig.measure_load(clients, seconds)
            quiet = await rig.longest_health_check(asyncio.sleep(1.0))
            own, everything = await rig.scrape("/metrics?workers=false"), await rig.scrape("/metrics?workers=true")
        return FleetFigures(
            *(size, places.apart, Latency.of(lone), lone_submit, rig.floor, rest, clients, seconds, jobs),
            submit_ms=Latency.of(submits),
            end_to_end_ms=Latency.of(ends),
            job=_beyond(rest, used, took, len(ends) + len(submits)),
            quiet_ms=1000 * quiet,
            own=own,
            all=everything,
            cpus=os.cpu_count() or 1,
            load=load,
        )


class _Rig:
    """The running processes. Clients are in this one."""

    def __init__(self, urls: Sequence[str], parts: Sequence[Sequence[int]]) -> None:
        """`urls` of the gateways; `parts`: process ids of queue servers, gateways and workers."""
        self.urls, self._parts = urls, parts
        self._seed = 0
        self.floor = Costs(0.0, 0.0, 0.0)

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path, size: Size, places: Hosts) -> AsyncIterator[_Rig]:
        common: dict[str, object] = {"LOG_JSON": "true", "RESULT_TTL_SECONDS": 60, "MAX_WAITING": 1_000_000}
        common |= {"WORKER_METRICS_PORT": 0, "THREADS": 1}
        async with AsyncExitStack() as stack:
            servers = [await _start_server(stack, folder, places, number) for number in range(size.queue_servers)]
            addresses = [address for address, _ in servers]
            common |= {"REDIS_URLS": ",".join(addresses)} if len(servers) > 1 else {"REDIS_URL": addresses[0]}
            urls: list[str] = []
            gateways: list[int] = []
            workers: list[int] = []
            for number in range(size.gateways):
                host = places.make()
                port = 8000 if places.apart else free_port()
                settings = common | {"HOST": host.address, "HTTP_PORT": port}
                settings |= {"GRPC_PORT": 50051 if places.apart else free_port()}
                command = [*host.before, executable, "-P", "-m", "patchforge", "gateway"]
                process = await launch(stack, command, folder / f"gateway-{number}.log", settings)
                gateways.append(process.pid)
                urls.append(f"http://{host.address}:{port}")
            rig = cls(urls, ([pid for _, pid in servers], gateways, workers))
            for url in urls:
                await wait_until_ready(url, "/healthz")
            rig.floor = await rig.measure_rest()
            for first in range(0, size.workers, PER_PROCESS):
                host, count = places.make(), min(PER_PROCESS, size.workers - first)
                command = [*host.before, executable, "-P", "-m", "patchforge.service.bench.noop_fleet", str(count)]
                process = await launch(stack, command, folder / f"workers-{first}.log", common)
                workers.append(process.pid)
            for url in urls:
                await wait_until_ready(url)
                await _wait_for_workers(url, size.workers)
            await rig.submit_one_by_one(10)  # warm up
            yield rig

    def costs(self) -> Costs:
        """Processor time since the processes started."""
        return Costs(*(sum(map(processor_ms, part)) for part in self._parts))

    async def measure_rest(self) -> Costs:
        """Costs per second while nothing happens."""
        await asyncio.sleep(2.0)  # until what was before is done
        before, began = self.costs(), time.monotonic()
        await asyncio.sleep(REST_SECONDS)
        return self.costs().since(before, 1 / (time.monotonic() - began))

    async def submit_one_by_one(self, submits: int) -> list[float]:
        """Seconds from request to answer, of jobs that nobody waits for, at one gateway."""
        took = []
        async with Connection(self.urls[0]) as connection:
            for _ in range(submits):
                took.append(await _submit(connection))
                await asyncio.sleep(0.02)
        return took

    async def measure_load(self, clients: int, seconds: float) -> tuple[list[float], list[float], int, Costs, float]:
        """Load from clients that each wait for their picture.

        Returns:
            the seconds of submits beside the clients' requests; those of all jobs from request to picture; the number
            of jobs that ended within `seconds`; the costs of all; and how long it took.
        """
        before, began = self.costs(), time.monotonic()
        stop = began + seconds
        submits: list[float] = []
        ends: list[float] = []
        in_time = 0

        async def keep_drawing(url: str) -> None:
            nonlocal in_time
            async with Connection(url) as connection:
                while (asked := time.monotonic()) < stop:
                    await self._draw(connection)
                    ends.append(time.monotonic() - asked)
                    in_time += time.monotonic() < stop

        async def keep_probing(url: str) -> None:
            async with Connection(url) as connection:
                while time.monotonic() < stop:
                    submits.append(await _submit(connection))
                    await asyncio.sleep(PROBE_SECONDS)

        drawing = [keep_drawing(self.urls[number % len(self.urls)]) for number in range(clients)]
        await asyncio.gather(*drawing, keep_probing(self.urls[0]))
        return submits, ends, in_time, self.costs().since(before), time.monotonic() - began

    async def scrape(self, path: str) -> Scrapes:
        """Scrapes the first gateway, and asks for its health meanwhile."""
        took: list[float] = []
        size = 0

        async def scrape() -> None:
            nonlocal size
            async with Connection(self.urls[0]) as connection:
                for _ in range(SCRAPES):
                    began = time.monotonic()
                    status, answer = await connection.get(path)
                    _require(status == 200, status, answer)
                    took.append(time.monotonic() - began)
                    size = len(answer)

        await asyncio.sleep(0.5)
        gateway = self._parts[1][0]
        before = processor_ms(gateway)
        longest = await self.longest_health_check(scrape())
        used = (processor_ms(gateway) - before) / SCRAPES
        return Scrapes(statistics.median(took), size, 1000 * longest, used)

    async def longest_health_check(self, meanwhile: object) -> float:
        """Longest seconds that one gateway took for `/healthz`, asked all the time until `meanwhile` is done."""
        assert asyncio.iscoroutine(meanwhile)
        working, longest = asyncio.create_task(meanwhile), 0.0
        async with Connection(self.urls[0]) as connection:
            while not working.done():
                began = time.monotonic()
                status, answer = await connection.get("/healthz")
                _require(status == 200, status, answer)
                longest = max(longest, time.monotonic() - began)
                await asyncio.sleep(0.002)
        await working
        return longest

    async def _draw(self, connection: Connection) -> None:
        self._seed += 1
        body = {"model": CARD.name, "prompt": "nothing", "seed": self._seed, "response_format": "b64_json"}
        status, answer = await connection.post("/v1/images/generations", json.dumps(body).encode())
        _require(status == 200, status, answer)


def _beyond(rest: Costs, used: Costs, seconds: float, jobs: int) -> Costs:
    """Costs per job, without those of that time at rest."""
    return used.since(Costs(*(seconds * each for each in astuple(rest))), 1 / max(1, jobs))


async def _start_server(stack: AsyncExitStack, folder: Path, places: Hosts, number: int) -> tuple[str, int]:
    """Starts a queue server. Returns its URL and process id."""
    host, port = places.make(), 6379 if places.apart else free_port()
    home = folder / f"queue-{number}"
    home.mkdir()
    options = {"bind": host.address, "port": port, "dir": home, "appendonly": "yes", "appendfsync": "everysec"}
    options |= {"save": "", "maxmemory": MEMORY, "maxmemory-policy": "noeviction", "protected-mode": "no"}
    options |= {"logfile": home / "server.log"}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [*host.before, find_binary(), *words]
    process = await launch(stack, command, home / "stderr.log", {})
    client: Redis = Redis(host=host.address, port=port)
    give_up = time.monotonic() + READY_SECONDS
    try:
        while time.monotonic() < give_up:
            with suppress(RedisError, OSError):
                await client.ping()
                return f"redis://{host.address}:{port}/0", process.pid
            await asyncio.sleep(0.05)
    finally:
        await client.aclose()
    raise Unavailable(f"a queue server was not ready in {READY_SECONDS:.0f} s")


async def _wait_for_workers(url: str, count: int) -> None:
    """Waits until a gateway counts so many live workers."""
    give_up = time.monotonic() + READY_SECONDS
    async with Connection(url) as connection:
        while time.monotonic() < give_up:
            _, answer = await connection.get("/metrics?workers=false")
            lines = [line.split() for line in answer.splitlines() if line.startswith(b"patchforge_workers ")]
            if lines and float(lines[0][1]) >= count:
                return
            await asyncio.sleep(0.5)
    raise Unavailable(f"{count} workers were not ready in {READY_SECONDS:.0f} s")


async def _submit(connection: Connection) -> float:
    """Seconds from a request to its answer, of a job that nobody waits for."""
    began = time.monotonic()
    status, answer = await connection.post("/v1/jobs", BODY)
    _require(status == 202, status, answer)
    return time.monotonic() - began


def _require(holds: bool, status: int, answer: bytes) -> None:
    if not holds:
        raise Unavailable(f"the gateway answered with status {status}: {answer.decode(errors='replace')[:200]}")

"""`patchforge bench fleet`."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table, write_json
from patchforge.service.errors import Unavailable

if TYPE_CHECKING:
    from patchforge.service.bench.fleet import Costs, FleetFigures, Scrapes
    from patchforge.service.bench.gateway import Latency


def fleet(
    workers: Annotated[int, typer.Option(min=1, max=5000, help="Workers without a model.")] = 100,
    gateways: Annotated[int, typer.Option(min=1, max=64, help="Gateways.")] = 1,
    queue_servers: Annotated[int, typer.Option(min=1, max=8, help="Queue servers.")] = 1,
    clients: Annotated[int, typer.Option(min=1, max=500, help="Concurrent clients that wait for pictures.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long these clients keep asking.")] = 10.0,
    namespaces: Annotated[
        bool | None,
        typer.Option(help="A network namespace for each process, or loopback for all. Default: the former as root."),
    ] = None,
    out: options.Json = None,
) -> None:
    """Measure a fleet of workers without a model: what a job and a scrape cost each part, and what a core carries."""
    from patchforge.service.bench.fleet import Size, bench_fleet

    size = Size(workers, gateways, queue_servers)
    with tempfile.TemporaryDirectory(prefix="patchforge-bench-") as folder, typed_errors():
        try:
            figures = asyncio.run(bench_fleet(Path(folder), size, clients, seconds, namespaces))
        except EOFError as error:  # typer would take it for Ctrl-D
            raise Unavailable("the gateway closed a connection; try fewer clients or a quieter machine") from error
    rows = [
        ("submit to answer, one at a time, p50 / p95", _format_latency(figures.lone_submit_ms)),
        ("such a job: queue servers / gateways / workers", _format_costs(figures.lone_submit)),
        (f"jobs per second from {clients} clients", f"{figures.jobs_per_second:.0f}"),
        ("submit to answer meanwhile, p50 / p95", _format_latency(figures.submit_ms)),
        ("request to picture meanwhile, p50 / p95", _format_latency(figures.end_to_end_ms)),
        ("a job, its picture waited for: the same parts", _format_costs(figures.job)),
        ("a second without any job", _format_costs(figures.rest)),
        ("a second without workers", _format_costs(figures.floor)),
        ("scrape of the gateway's own metrics", _format_scrapes(figures.own)),
        ("scrape with all workers' metrics", _format_scrapes(figures.all)),
        ("/healthz without scrapes, longest", f"{figures.quiet_ms:.0f} ms"),
    ]
    network = "each process in its own network namespace" if figures.apart else "all on the loopback address"
    title = f"measured: {workers} workers, {gateways} gateways, {queue_servers} queue servers, {network}, "
    print_table(f"{title}{figures.cpus} CPUs, load before {figures.load:.1f}", ("what", "measured"), rows, width=110)
    print_table("computed from processor times: jobs per second for one core", ("core of", "jobs/s"), _carried(figures))
    if out is not None:
        write_json(out, asdict(figures))


def _carried(figures: FleetFigures) -> list[tuple[str, str]]:
    """What one core carries if nothing but processor time counts: no rate as high as that was tried."""
    fleets = sorted({figures.size.workers, 1000})
    queues = [(f"a queue server, {count} workers", f"{figures.carried_by_queue_core(count):.0f}") for count in fleets]
    return [*queues, ("a gateway", f"{figures.carried_by_gateway_core():.0f}")]


def _format_costs(costs: Costs) -> str:
    return f"{costs.queue_servers:.2f} / {costs.gateways:.2f} / {costs.workers:.2f} ms"


def _format_latency(latency: Latency) -> str:
    return f"{latency.p50:.1f} / {latency.p95:.1f} ms"


def _format_scrapes(scrapes: Scrapes) -> str:
    took = f"{scrapes.seconds:.2f} s; processor {scrapes.gateway_ms:.0f} ms"
    return f"{took}; longest /healthz {scrapes.stall_ms:.0f} ms"

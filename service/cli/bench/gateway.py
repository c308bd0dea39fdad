"""`patchforge bench gateway`."""

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
    from patchforge.service.bench.gateway import Costs, Latency


def gateway(
    submits: Annotated[int, typer.Option(min=1, help="Jobs submitted one at a time, for the latency.")] = 500,
    clients: Annotated[int, typer.Option(min=1, max=500, help="Concurrent clients, for the rate.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long these clients keep submitting.")] = 10.0,
    watchers: Annotated[int, typer.Option(min=1, max=5000, help="Open event streams, for the memory.")] = 200,
    out: options.Json = None,
) -> None:
    """Measure what one gateway costs, without a model: submit to claim, jobs per second, memory with many watchers."""
    from patchforge.service.bench.gateway import PREVIEWS, bench_gateway

    with tempfile.TemporaryDirectory(prefix="patchforge-bench-") as folder, typed_errors():
        try:
            figures = asyncio.run(bench_gateway(Path(folder), submits, clients, seconds, watchers))
        except EOFError as error:  # typer would take it for Ctrl-D
            raise Unavailable("the gateway closed a connection; try fewer clients or a quieter machine") from error
    rows = [
        ("submit to answer, p50 / p95", _format_latency(figures.accepted_ms)),
        ("submit to claim, p50 / p95", _format_latency(figures.claimed_ms)),
        (f"jobs per second from {clients} clients", f"{figures.jobs_per_second:.0f}"),
        ("submit to claim meanwhile, p50 / p95", _format_latency(figures.loaded_claimed_ms)),
        ("processor time per job, gateway / queue server", _format_costs(figures.job_costs)),
        (f"the same, {PREVIEWS} previews and a watcher", _format_costs(figures.watched_job_costs)),
        ("memory at rest", f"{figures.idle_mib:.0f} MiB"),
        (f"memory with {watchers} watchers", f"{figures.watched_mib:.0f} MiB"),
    ]
    title = f"one gateway, {figures.cpus} CPUs, load before {figures.load:.1f}"
    print_table(title, ("figure", "measured"), rows, width=100)
    if out is not None:
        write_json(out, asdict(figures))


def _format_costs(costs: Costs) -> str:
    return f"{costs.gateway_ms:.1f} / {costs.queue_server_ms:.1f} ms"


def _format_latency(latency: Latency) -> str:
    return f"{latency.p50:.1f} / {latency.p95:.1f} ms"

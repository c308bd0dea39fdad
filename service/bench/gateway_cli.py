"""``patchforge bench gateway``."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.cli_errors import typed_errors
from service.errors import Unavailable

if TYPE_CHECKING:
    from service.bench.gateway import Costs, Latency


def gateway(
    submits: Annotated[int, typer.Option(min=1, help="One at a time, for the latency.")] = 500,
    clients: Annotated[int, typer.Option(min=1, max=500, help="At once, for the rate.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long they keep submitting.")] = 10.0,
    watchers: Annotated[int, typer.Option(min=1, max=5000, help="Open streams, for the memory.")] = 200,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """What one gateway adds to a job: submit to claim, jobs a second, memory with many watchers; no model runs."""
    from service.bench.gateway import PREVIEWS, bench_gateway

    with tempfile.TemporaryDirectory(prefix="patchforge-bench-") as folder, typed_errors():
        try:
            figures = asyncio.run(bench_gateway(Path(folder), submits, clients, seconds, watchers))
        except EOFError as error:  # which typer would take for the user's own end
            raise Unavailable("the gateway hung up on a client; is the machine too busy for so many?") from error
    table = Table("figure", "measured", title=f"one gateway, {figures.cpus} CPUs, load before {figures.load:.1f}")
    for name, value in (
        ("submit to answer, p50 / p95", _both(figures.accepted_ms)),
        ("submit to claim, p50 / p95", _both(figures.claimed_ms)),
        (f"jobs a second from {clients} clients", f"{figures.jobs_per_second:.0f}"),
        ("submit to claim meanwhile, p50 / p95", _both(figures.loaded_claimed_ms)),
        ("processor time a job, gateway / queue server", _costs(figures.job_costs)),
        (f"the same, {PREVIEWS} previews and a watcher", _costs(figures.watched_job_costs)),
        ("memory at rest", f"{figures.idle_mib:.0f} MiB"),
        (f"memory with {watchers} watchers", f"{figures.watched_mib:.0f} MiB"),
    ):
        table.add_row(name, value)
    Console(width=100).print(table)
    if out is not None:
        out.write_text(json.dumps(asdict(figures), indent=1) + "\n")


def _costs(costs: Costs) -> str:
    return f"{costs.gateway_ms:.1f} / {costs.queue_server_ms:.1f} ms"


def _both(latency: Latency) -> str:
    return f"{latency.p50:.1f} / {latency.p95:.1f} ms"

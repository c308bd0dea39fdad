"""`patchforge bench queue`."""

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
    from patchforge.service.bench.queue import Usage


def queue(
    model: Annotated[str, typer.Option(help="Name of a shipped bundle that takes prompts.")] = "emoji-text",
    jobs: Annotated[int, typer.Option(min=1, help="Pictures drawn for each figure.")] = 60,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Concurrent clients that ask for them.")] = 4,
    fleet: Annotated[int, typer.Option(min=1, max=2000, help="Idle workers without a model.")] = 100,
    round_trip: Annotated[float, typer.Option(min=0.0, max=2.0, help="Seconds to a distant queue server.")] = 0.05,
    out: options.Json = None,
) -> None:
    """Measure what a job costs the queue server, with a real worker; and how distance and many workers change that."""
    from patchforge.service.bench.queue import bench_queue

    with tempfile.TemporaryDirectory(prefix="patchforge-bench-") as folder, typed_errors():
        try:
            figures = asyncio.run(bench_queue(Path(folder), model, jobs, clients, fleet, round_trip))
        except EOFError as error:  # typer would take it for Ctrl-D
            raise Unavailable("the gateway closed a connection; try fewer clients or a quieter machine") from error
    rows = [
        ("a job without previews", _format_usage(figures.plain)),
        ("a job with previews and a watcher", _format_usage(figures.streamed)),
        ("a second without any job", _format_usage(figures.rest)),
        ("a job for the only worker, without a model", _format_usage(figures.alone)),
        (f"the same, {figures.fleet} workers wait for it", _format_usage(figures.among)),
    ]
    title = f"the queue server's work, {figures.clients} clients, {figures.cpus} CPUs, load before {figures.load:.1f}"
    print_table(title, ("what", "processor time / scripts / commands"), rows, width=100)
    times = [
        ("beside the queue server", f"{figures.near_seconds:.2f} s"),
        (f"{1000 * figures.round_trip:.0f} ms away from it", f"{figures.far_seconds:.2f} s"),
    ]
    print_table("a picture, one at a time", ("gateway and worker", "median"), times, width=100)
    if out is not None:
        write_json(out, asdict(figures))


def _format_usage(usage: Usage) -> str:
    return f"{usage.milliseconds:.2f} ms / {usage.scripts:.1f} / {usage.commands:.0f}"

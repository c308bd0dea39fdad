"""`patchforge soak`."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table

PLAIN_SECONDS = 30.0  # between lines of progress if the output is not a terminal


def soak(
    minutes: Annotated[float, typer.Option(min=0.1, max=24 * 60, help="Duration of traffic and faults.")] = 5.0,
    bundle_dir: Annotated[
        Path | None, typer.Option("--bundles", help="Folder of model bundles; default: the shipped bundles.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Concurrent clients.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of client actions and faults.")] = 0,
    hurry: Annotated[
        float, typer.Option(min=0, max=10, help="Factor for how often faults happen; 0 = never, to look for leaks.")
    ] = 1.0,
    sentinels: Annotated[
        bool, typer.Option("--sentinels", help="Replicated queue servers with Sentinels, whose masters fail.")
    ] = False,
    from_version: Annotated[
        Path | None,
        typer.Option(
            help="Another version (wheel, virtual environment, or folder with patchforge/): all gateways and workers "
            "begin with it, and change to this one, back, and to this one again."
        ),
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep logs and queue data in this empty folder.")] = None,
) -> None:
    """Send mixed traffic while gateways, workers and Redis are killed; exit with status 1 if a promise is broken.

    The soak starts its own two gateways, two workers and queue server on free ports of loopback addresses.
    """
    from patchforge.service.soak.run import Verdict
    from patchforge.service.soak.run import soak as run

    console = Console(width=None if Console().is_terminal else 120)
    with tempfile.TemporaryDirectory(prefix="patchforge-soak-") as temporary, typed_errors():
        from patchforge.model.shipped import BUNDLES

        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise typer.BadParameter(
                "the folder is not empty; the soak would count jobs of an earlier run", param_hint="--keep"
            )
        with _progress_line(console, 60 * minutes) as show:
            soaking = run(
                folder, bundle_dir or BUNDLES, 60 * minutes, clients, seed, show, hurry, sentinels, from_version
            )
            verdict: Verdict = asyncio.run(soaking)
    for title, rows in (("answers", verdict.answers), ("faults", verdict.faults), ("jobs", verdict.tally)):
        print_table(None, (title, "count"), [(name, str(count)) for name, count in rows.items()], console.width)
    for name, course in verdict.memory.items():
        marks, trend = ", ".join(f"{size / 2**20:.1f}" for size in course), verdict.trend[name] / 2**20
        console.print(f"memory of {name} after warm-up, MiB: {marks}; trend of the last 2/3: {trend:+.1f}")
    console.print(f"keys without an expiry: {verdict.lasting}")
    console.print(", ".join(f"{kind} = {count}" for kind, count in verdict.tally.items()), style="bold")
    for promise in verdict.broken:
        console.print(f"BROKEN: {promise}", style="red", markup=False)
    if verdict.broken:
        raise typer.Exit(1)


@contextmanager
def _progress_line(console: Console, seconds: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on a terminal; otherwise a line every `PLAIN_SECONDS`."""
    columns = TextColumn("soak"), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}")
    printed = -PLAIN_SECONDS
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=seconds)

        def show(passed: float, words: str) -> None:
            nonlocal printed
            bar.update(task, completed=passed, description=words)
            if not console.is_terminal and time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                console.print(f"{passed:6.0f} of {seconds:.0f} s: {words}")

        yield show

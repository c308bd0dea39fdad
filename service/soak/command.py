"""``patchforge soak`` on the command line."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.cli_errors import typed_errors

PLAIN_SECONDS = 30.0  # between lines of progress where there is no terminal


def soak(
    minutes: Annotated[float, typer.Option(min=0.1, max=24 * 60, help="How long traffic and mishaps go on.")] = 5.0,
    bundle_dir: Annotated[Path, typer.Option("--bundles", help="Folder of model bundles.")] = Path("model/bundles"),
    clients: Annotated[int, typer.Option(min=1, max=64, help="Callers at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of what callers do and what goes wrong.")] = 0,
    hurry: Annotated[
        float, typer.Option(min=0, max=10, help="Divides the time between mishaps; 0: none, to look for leaks.")
    ] = 1.0,
    keep: Annotated[Path | None, typer.Option(help="Keep logs and queue data in this folder.")] = None,
) -> None:
    """Mixed traffic while gateways, workers and Redis are killed; exit status 1 if any promise was broken.

    Starts its own two gateways, two workers and queue server on free ports of the loopback address.
    """
    from service.soak.run import Verdict
    from service.soak.run import soak as run

    console = Console(width=None if Console().is_terminal else 120)
    with tempfile.TemporaryDirectory(prefix="patchforge-soak-") as temporary, typed_errors():
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise typer.BadParameter(
                "the folder is not empty: what an earlier soak left would be counted", param_hint="--keep"
            )
        with _ProgressLine(console, 60 * minutes) as line:
            verdict: Verdict = asyncio.run(run(folder, bundle_dir, 60 * minutes, clients, seed, line.show, hurry))
    for title, rows in (("answers", verdict.answers), ("mishaps", verdict.mishaps), ("jobs", verdict.tally)):
        table = Table(title, "count")
        for name, count in rows.items():
            table.add_row(name, str(count))
        console.print(table)
    for name, course in verdict.memory.items():
        marks, trend = ", ".join(f"{size / 2**20:.1f}" for size in course), verdict.trend[name] / 2**20
        console.print(f"memory of {name}, from settled to the end, MiB: {marks}; trend of the last 2/3: {trend:+.1f}")
    console.print(f"keys without an expiry: {verdict.lasting}")
    console.print(", ".join(f"{kind} = {count}" for kind, count in verdict.tally.items()), style="bold")
    for what in verdict.broken:
        console.print(f"BROKEN: {what}", style="red", markup=False)
    if verdict.broken:
        raise typer.Exit(1)


class _ProgressLine:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console, seconds: float) -> None:
        self._console, self._seconds, self._printed = console, seconds, -PLAIN_SECONDS
        columns = TextColumn("soak"), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting", total=seconds)

    def __enter__(self) -> _ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._bar.stop()

    def show(self, passed: float, words: str) -> None:
        self._bar.update(self._task, completed=passed, description=words)
        if not self._console.is_terminal and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._console.print(f"{passed:6.0f} of {self._seconds:.0f} s: {words}")

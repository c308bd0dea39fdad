"""What `patchforge generate` shares between drawing here and drawing on a server: the result and the progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from patchforge.service.cli.album import Wanted
from patchforge.service.client.results import Picture

OnPreview = Callable[[bytes], None]
"""Takes an encoded preview."""


class Drawn(NamedTuple):
    """A picture that was wanted."""

    wanted: Wanted
    picture: Picture
    savings: float
    """Share of the dense run's patch evaluations that were not needed, from 0 to 1."""
    truncated: bool = False
    """The prompt, or the negative one, has more tokens than the model reads."""


def new_progress() -> Progress:
    """One line per picture on stderr, if that is a terminal; the lines disappear at the end."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:24.24}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def update_line(progress: Progress, line: TaskID, done: float, finished: float) -> None:
    """Show the share of network evaluations that are `done` and of patches that are `finished` (at t = 1)."""
    progress.update(line, completed=done, state=f"{finished:.0%} of the patches finished")

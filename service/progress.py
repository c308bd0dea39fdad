"""The progress lines of `patchforge generate`: one a picture, with the share of its patches that are finished."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

OnPreview = Callable[[bytes], None]
"""Takes an encoded preview."""


def generation_progress() -> Progress:
    """On stderr, if that is a terminal; nothing of it stays."""
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


def add_line(progress: Progress, prompt: str, state: str) -> TaskID:
    """A line that has not begun."""
    return progress.add_task(prompt, total=1.0, state=state)


def show_share(progress: Progress, line: TaskID, done: float, finished: float) -> None:
    """``done``: share of the network evaluations; ``finished``: share of the patches that stand at t = 1."""
    progress.update(line, completed=done, state=f"{finished:.0%} of the patches finished")

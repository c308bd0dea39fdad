"""The progress line of long commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Note(ProgressColumn):
    """Shows the task's `note` field, if it has one."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""))


def progress_bar() -> Progress:
    """Make a bar on stderr that shows the step, the task's `note`, and the time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Note(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=1,
    )

"""Draws pictures on a server; free of torch."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import Progress, TaskID

from patchforge.class_names import knows_class
from patchforge.service.cli.album import Wanted
from patchforge.service.cli.drawing import Drawn, OnPreview, update_line
from patchforge.service.client import AsyncClient
from patchforge.service.errors import NotFound
from patchforge.service.messages.events import Event, PatchesFinished, Preview, Started
from patchforge.service.messages.schemas import ModelCard

MAX_JOBS = 8  # of one command in the server's queue at a time


async def draw_online(
    server: str,
    api_key: str | None,
    wanted: Sequence[Wanted],
    progress: Progress,
    keep: Callable[[Drawn], None],
    model: str | None = None,
    on_preview: OnPreview | None = None,
    **fields: Any,
) -> None:
    """Draw pictures, in one job each, and give each to `keep` once it is finished; cancellation cancels the jobs.

    For a class-conditional model the prompts are class names. `progress` must be on screen already. `on_preview`
    gets previews only if a single picture is wanted. `fields` are the fields of a generation request; None means the
    model's default.

    Raises:
        PatchforgeError: the server refused a request, a job failed, or the server cannot be reached.
    """
    async with AsyncClient(server, api_key=api_key) as client:
        card = chosen(await client.models(), model, [each.prompt for each in wanted])
        subject = "prompt" if card.kind == "text" else "class_label"
        slots = asyncio.Semaphore(MAX_JOBS)
        single_preview = on_preview if len(wanted) == 1 else None

        async def draw(each: Wanted) -> None:
            request = fields | {"model": card.name, subject: each.prompt, "seed": each.seed}
            async with slots:
                line = progress.add_task(each.prompt, total=1.0, state="queued")
                result = await client.generate(
                    on_event=lambda event: show_event(progress, line, event, single_preview), **request
                )
                progress.remove_task(line)
            [picture] = result.pictures
            report = result.report
            truncated = report.prompt_truncated or report.negative_prompt_truncated
            keep(Drawn(each, picture, report.savings_ratio, truncated))

        try:
            async with asyncio.TaskGroup() as group:  # the first failure cancels the other tasks
                for each in wanted:
                    group.create_task(draw(each))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


def chosen(cards: Sequence[ModelCard], model: str | None, prompts: Sequence[str]) -> ModelCard:
    """The model of that name. Without a name: the first text model, or else the first model with these classes.

    Raises:
        NotFound: the server has no such model.
    """
    if model is None and cards:
        able = [card for card in cards if card.kind == "text"] or [
            card for card in cards if all(knows_class(each, card.classes) for each in prompts)
        ]
        return (able or cards)[0]
    for card in cards:
        if card.name == model:
            return card
    names = ", ".join(card.name for card in cards) or "none, because no worker is running"
    raise NotFound(f"no such model; the server has {names}", field="model")


def show_event(progress: Progress, line: TaskID, event: Event, on_preview: OnPreview | None) -> None:
    """Update the progress line with an event, and pass on the preview."""
    if isinstance(event, Started):
        progress.update(line, state="drawing")
    elif isinstance(event, Preview | PatchesFinished):
        update_line(progress, line, event.evaluation / event.evaluations, event.finished_share)
    if isinstance(event, Preview) and on_preview is not None:
        on_preview(b64decode(event.b64_png))

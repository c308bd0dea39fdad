"""Pictures from a server for the command line; free of torch."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

from rich.progress import Progress, TaskID

from service.client import AsyncClient, Result
from service.errors import NotFound
from service.events import Event, PatchesFinished, Preview, Started
from service.progress import OnPreview, add_line, show_share
from service.schemas import ModelCard

AT_ONCE = 8  # jobs of one command in the server's queue


async def generate_online(
    server: str,
    api_key: str | None,
    prompts: Sequence[str],
    progress: Progress,
    model: str | None = None,
    on_preview: OnPreview | None = None,
    **fields: Any,
) -> list[Result]:
    """One picture a prompt (a class name, for a class-conditional model), each a job of its own.

    ``progress`` is on show already; ``on_preview`` is shown the previews of a single prompt; ``fields`` are those of
    a generation request, None for the model's defaults. Being cancelled cancels the jobs. Raises PatchforgeError.
    """
    async with AsyncClient(server, api_key=api_key) as client:
        card = chosen(await client.models(), model)
        places = asyncio.Semaphore(AT_ONCE)

        async def one(prompt: str, line: TaskID) -> Result:
            wanted = fields | {"model": card.name, "prompt" if card.kind == "text" else "class_label": prompt}
            shown = on_preview if len(prompts) == 1 else None
            async with places:
                return await client.generate(on_event=lambda event: show(progress, line, event, shown), **wanted)

        lines = [add_line(progress, prompt, "queued") for prompt in prompts]
        try:
            async with asyncio.TaskGroup() as group:  # the first that fails cancels the others
                tasks = [group.create_task(one(*each)) for each in zip(prompts, lines, strict=True)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def chosen(cards: Sequence[ModelCard], model: str | None) -> ModelCard:
    """The model of that name; left out, the first that takes prompts, else the first."""
    if model is None and cards:
        return next((card for card in cards if card.kind == "text"), cards[0])
    for card in cards:
        if card.name == model:
            return card
    names = ", ".join(card.name for card in cards) or "none: no worker is there"
    raise NotFound(f"no such model; the server has {names}", field="model")


def show(progress: Progress, line: TaskID, event: Event, on_preview: OnPreview | None) -> None:
    """An event on its progress line, and a preview where previews go."""
    if isinstance(event, Started):
        progress.update(line, state="drawing")
    elif isinstance(event, Preview | PatchesFinished):
        show_share(progress, line, event.evaluation / event.evaluations, event.finished_share)
    if isinstance(event, Preview) and on_preview is not None:
        on_preview(b64decode(event.b64_png))

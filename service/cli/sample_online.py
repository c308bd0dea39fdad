"""Draws samples on a server and all its workers; free of torch."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from patchforge.service.cli.sample import Advance, Order, choose_subjects, describe
from patchforge.service.cli.samples import SampleFolder
from patchforge.service.client import AsyncClient
from patchforge.service.client.errors import Unreachable
from patchforge.service.errors import NotFound, QueueFull, RateLimited, Unavailable

BUSY = QueueFull, RateLimited, Unavailable, Unreachable
"""What passes: a run of hours outlives a full queue and a server that restarts."""
LONGEST_WAIT_SECONDS = 30.0
GIVE_UP_SECONDS = 600.0


async def sample_online(
    server: str,
    api_key: str | None,
    folder: SampleFolder,
    order: Order,
    words: list[str] | None,
    balanced: bool,
    jobs: int,
    advance: Advance,
) -> None:
    """Draw the missing samples, in one job of low priority each, `jobs` at a time.

    Raises:
        PatchforgeError: the server refused a request, or a job failed.
    """
    async with AsyncClient(server, api_key=api_key) as client:
        cards = await client.models()
        found = [card for card in cards if card.name == order.model]
        if not found:
            names = ", ".join(card.name for card in cards) or "none, because no worker is running"
            raise NotFound(f"no such model; the server has {names}", field="model")
        [card] = found
        subjects = choose_subjects(card.name, card.classes, words, balanced, order.seed)
        defaults = card.model_dump(mode="json", include={"sampler", "steps", "guidance"})
        folder.begin(describe(order, subjects, card.weights_sha256, defaults))
        missing = folder.missing()
        there = folder.count - len(missing)
        subject = "prompt" if card.kind == "text" else "class_label"
        ahead = iter(missing)

        async def draw_next() -> None:
            nonlocal there
            for index in ahead:
                fields: dict[str, Any] = {"model": card.name, subject: subjects.of(index), "seed": order.seed + index}
                folder.add(index, await _draw(client, fields | order.drawing | {"priority": "low"}))
                there += 1
                advance(there)

        advance(there)
        try:
            async with asyncio.TaskGroup() as group:  # the first failure cancels the other tasks
                for _ in range(min(jobs, len(missing))):
                    group.create_task(draw_next())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


async def _draw(client: AsyncClient, request: dict[str, Any]) -> bytes:
    """Draw one sample, and try again while the server is busy or away, but not for ever."""
    wait, began = 1.0, time.monotonic()
    while True:
        try:
            result = await client.generate(**request)
            return result.pictures[0].data
        except BUSY as error:
            if time.monotonic() - began > GIVE_UP_SECONDS:
                raise
            await asyncio.sleep(error.retry_after or wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

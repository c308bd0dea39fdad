"""Large previews in the object store: put there by workers, and brought back before anybody sees their small copies."""

from __future__ import annotations

import asyncio
import binascii
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress

from redis.asyncio import Redis

from patchforge.service.errors import NotFound, ResultsUnavailable
from patchforge.service.messages.events import Event, Preview
from patchforge.service.messages.small_copies import split_reference, with_reference
from patchforge.service.queue.claims import Claim
from patchforge.service.queue.pictures import PictureStore
from patchforge.service.results import Reference
from patchforge.service.settings import Settings

FETCH_SECONDS = 1.0  # that a watcher waits for previews; then it shows small copies
PAUSE_SECONDS = 5.0  # after that, without another attempt: a store that is away must not slow streams down
MOST_FETCHED = 4  # previews that a watcher gets at once; if there are more, only the newest of each picture


class StoredPreviews(PictureStore):
    """Previews apart from their events. A preview that cannot be brought is shown as its small copy."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        super().__init__(redis, blocking, settings)
        self._no_previews_before = 0.0

    async def put_preview(self, claim: Claim, preview: Preview, small: bytes) -> tuple[Preview, Reference]:
        """Stores a preview's PNG. Returns what to publish in place of the preview, and where the PNG is.

        Args:
            small: its small copy, a PNG.

        Raises:
            ResultsUnavailable: the object store cannot be used.
        """
        attempt = f"{claim.entry_id}-{claim.attempt}"  # another attempt may get to the same evaluation
        name = f"{claim.job.id}/preview-{preview.index}-{preview.evaluation}-{attempt}.png"
        reference = await self._store().put(name, b64decode(preview.b64_png), "image/png")
        return preview.model_copy(update={"b64_png": with_reference(small, reference)}), reference

    async def _bring_previews(self, events: Sequence[Event | None]) -> list[Event | None]:
        """Returns the events with previews in place of their small copies."""
        found, references = list(events), dict[int, Reference]()
        for place, event in enumerate(events):
            if isinstance(event, Preview):
                with suppress(binascii.Error, IndexError):  # damaged: the client's own decoder may say so
                    png, reference = split_reference(event.b64_png)
                    if reference is not None:
                        found[place] = event.model_copy(update={"b64_png": png})
                        references[place] = Reference(reference)
        if references and self.objects is not None and time.monotonic() >= self._no_previews_before:
            for place, data in (await self._fetch(_newest(events, references))).items():
                if isinstance(event := found[place], Preview):
                    found[place] = event.model_copy(update={"b64_png": b64encode(data).decode()})
        return found

    async def _fetch(self, references: dict[int, Reference]) -> dict[int, bytes]:
        """Returns the objects that come in time."""
        fetching = {place: asyncio.ensure_future(self._store().get(each)) for place, each in references.items()}
        try:
            await asyncio.wait(fetching.values(), timeout=FETCH_SECONDS)
        finally:
            late = [task for task in fetching.values() if task.cancel()]
            await asyncio.gather(*fetching.values(), return_exceptions=True)
        brought, away = {}, bool(late)
        for place, task in fetching.items():
            if task not in late:
                try:
                    brought[place] = task.result()
                except NotFound:
                    pass
                except ResultsUnavailable:
                    away = True
        if away:
            self._no_previews_before = time.monotonic() + PAUSE_SECONDS
        return brought


def _newest(events: Sequence[Event | None], references: dict[int, Reference]) -> dict[int, Reference]:
    """Returns what a watcher fetches: if it has fallen behind, nothing that newer previews replace."""
    if len(references) <= MOST_FETCHED:
        return references
    last = {event.index: place for place in references if isinstance(event := events[place], Preview)}
    return {place: references[place] for place in last.values()}

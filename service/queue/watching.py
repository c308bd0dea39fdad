"""Jobs as their callers see them: the record, the events as they happen, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Sequence

from redis.asyncio import Redis

from patchforge.service.errors import InvalidEventId, NotFound, Unavailable
from patchforge.service.messages.endings import terminal_event
from patchforge.service.messages.events import TERMINAL_EVENTS, Completed, Event
from patchforge.service.messages.schemas import Job
from patchforge.service.queue import keys
from patchforge.service.queue.chunks import Chunk, ChunkStore, moved_record
from patchforge.service.queue.event_hub import EventHub
from patchforge.service.queue.records import event_from, fields_of, job_from, with_digest
from patchforge.service.queue.stored_previews import StoredPreviews
from patchforge.service.settings import Settings

BATCH = 64  # events a watcher reads at once; if there are as many, it has fallen behind,
BATCH_BYTES = 512 << 10  # and so it has if they are larger than this: slow readers must not use up memory
FEW = 16  # events that a watcher reads without asking whether it has fallen behind
POLL = 2.0  # seconds after which a watcher reads without a bell, in case the bell was lost

_JOB_ID = re.compile(r"[0-9A-Z]{26}")
_EVENT_ID = re.compile(r"[0-9]{1,15}(-[0-9]{1,15})?")


class WatchedJobs(StoredPreviews, ChunkStore):
    """Reads and watches jobs. Any method may raise `Unavailable`: Redis is full or silent."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        super().__init__(redis, blocking, settings)
        self._hub = EventHub(blocking)

    async def close(self) -> None:
        await self._hub.close()
        await super().close()

    async def get(self, job_id: str) -> Job:
        """Returns the job.

        Raises:
            NotFound: there is no such job.
        """
        return await self._run_on_job("read", job_id)

    def watch(self, job_id: str, after: str = "0") -> AsyncGenerator[tuple[str, Event], None]:
        """Yields (event id, event): past events after the given id, then live ones, up to the terminal event.

        A reader that falls behind misses only previews that newer ones replace, even if its position was trimmed from
        the stream. Every reader gets the terminal event, unless `after` is its id. Other events that this version
        cannot read are skipped.

        Raises:
            InvalidEventId: `after` is malformed; raised by the call itself.
            NotFound: there is no such job; raised by the iteration.
        """
        if not _EVENT_ID.fullmatch(after):
            raise InvalidEventId("is not an event id", field="Last-Event-ID")
        return self._watch(job_id, after if "-" in after else f"{after}-0")

    async def wait_for_end(
        self, job_id: str, since: float | None = None, *, pictures: bool = False
    ) -> tuple[Event, dict[int, bytes]]:
        """Returns the job's terminal event, as soon as there is one. Costs less than to watch all events.

        With `pictures`, it returns those too, by their index, that happened to come with it: `image` has the others.

        Args:
            since: a time of the monotonic clock before the job was submitted here. A job that has had no event since
                then is not looked at before it has one.

        Raises:
            NotFound: there is no such job.
        """
        check_job_id(job_id)
        with self._hub.listen(job_id) as bell:
            waits = since is not None and not self._hub.may_have_rung(job_id, since)
            rung, rang_before = waits and await self._hear(bell), False
            while True:
                bell.clear()
                # The first bell of a quiet job is its end. Pictures of others must not be read again and again.
                record, found = await self._read_result(job_id, with_pictures=pictures and rung and not rang_before)
                if not record:
                    raise NotFound(f"no job {job_id}")
                if b"last_event" in record:
                    job = await self._whole_job([part for pair in record.items() for part in pair])
                    return terminal_event(job), found
                rang_before = rang_before or rung
                rung = await self._hear(bell)

    async def _read_result(self, job_id: str, *, with_pictures: bool) -> tuple[dict[bytes, bytes], dict[int, bytes]]:
        """Returns the record, and the pictures that are on the queue server."""
        job = "HGETALL", keys.job(job_id)
        if not with_pictures:
            return await self._do(*job), {}
        try:
            record, pictures = await self._do_together(job, ("HGETALL", keys.images(job_id)))
        except Unavailable:  # many large pictures over a slow line, perhaps: one by one they may arrive
            return await self._do(*job), {}
        return record, {int(field): data for field, data in pictures.items() if field.isdigit()}

    async def _watch(self, job_id: str, after: str) -> AsyncGenerator[tuple[str, Event], None]:
        check_job_id(job_id)
        rung = False
        with self._hub.listen(job_id) as bell:
            while True:
                bell.clear()
                last_id, more = None, False
                # Who waited at the bell has seen all before it: a plain read is cheaper, and enough unless it fails.
                entries, digest = await self._read_few_events(job_id, after) if rung else ([], None)
                if not entries:
                    status, last_id, entries, more = await self._run("news", job_id, after, BATCH, BATCH_BYTES)
                    if status is None:
                        raise NotFound(f"no job {job_id}")
                events = await self._bring_previews([event_from(fields) for _, fields in entries])
                for (entry_id, _), event in zip(entries, events, strict=True):
                    after = entry_id.decode()
                    if event is None and entry_id == last_id:
                        event = terminal_event(await self.get(job_id))
                    if event is None:
                        continue
                    if isinstance(event, Completed):
                        if last_id is not None:  # otherwise it came with the events
                            digest = await self._do("HGET", keys.job(job_id), "digest")
                        event = Completed(report=with_digest(event.report, digest))
                    yield after, event
                    if isinstance(event, TERMINAL_EVENTS):
                        return
                if not entries and last_id is not None:
                    # The job has ended, and its last event was seen before or is gone.
                    if last_id.decode() != after:
                        yield last_id.decode(), terminal_event(await self.get(job_id))
                    return
                rung = not more and await self._hear(bell)

    async def _hear(self, bell: asyncio.Event) -> bool:
        """Waits for the bell. Returns False after `POLL` seconds, or if the bell has rung meanwhile."""
        if bell.is_set():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL):
                await bell.wait()
                return True
        return False

    async def _read_few_events(self, job_id: str, after: str) -> tuple[list[tuple[bytes, list[bytes]]], bytes | None]:
        """Returns the events after an id, or none if there are many, or one cannot be read: then run `news`.

        The digest that the job's end wrote comes with them: with the last event, it is there too.
        """
        events = "XRANGE", keys.events(job_id), f"({after}", "+", "COUNT", FEW
        found, digest = await self._do_together(events, ("HGET", keys.job(job_id), "digest"))
        entries = [(entry_id, [part for pair in fields.items() for part in pair]) for entry_id, fields in found]
        legible = all(event_from(fields) is not None for _, fields in entries)
        return (entries, digest) if legible and len(entries) < FEW else ([], None)

    async def _run_on_job(self, command: str, job_id: str) -> Job:
        check_job_id(job_id)
        record = await self._run(command, job_id)
        if not record:
            raise NotFound(f"no job {job_id}")
        return await self._whole_job(record)

    async def _whole_job(self, record: Sequence[bytes]) -> Job:
        """Returns the job of a record, most of which may be in the object store: see `batch_results.py`.

        Raises:
            NotFound: it was deleted there, or has expired.
        """
        fields = fields_of(record)
        if "apart" not in fields:
            return job_from(record)
        file, first = fields["apart"].decode().split(" ")
        if (place := await self._do("HGET", keys.FILE_LINES + file, first)) is not None:
            for text in await self._read_kept(Chunk.read(b"0", place)):
                if fields["id"] in text and (found := moved_record(text)).get(b"id") == fields["id"]:
                    return job_from([part for pair in found.items() for part in pair])
        raise NotFound(f"no job {fields['id'].decode()}: it was deleted with the results of its batch")


def check_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound("no such job")

"""What became of a batch's lines: on the queue server, or moved into the object store some hundred lines at a time.

`move_results` in `batch_files.lua` takes what was moved from the queue server, in the call that notes where it is. Of a
job that was moved, the record says where the rest of it is; the references to its pictures stay.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from patchforge.service.errors import NotFound, ResultsElsewhere
from patchforge.service.queue import keys
from patchforge.service.queue.batch_records import RESULT_GONE, UNSETTLED, SettledLine, StoredBatch
from patchforge.service.queue.chunks import CHUNK_BYTES, Chunk, moved_record
from patchforge.service.queue.connection import redis_call
from patchforge.service.queue.files import LINES_READ, FileStore
from patchforge.service.queue.records import job_from

MOVED_LINES = 500  # of a batch that goes on, before they are moved; and most in one object
MOVES = 4  # in one call: other batches have their turns in between
KINDS = "output", "error"


@dataclass
class _Parts:
    """Lines for the two objects of one move."""

    lines: dict[str, list[bytes]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    size: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")).encode()
        self.lines[_kind_of(line["outcome"])].append(text)
        self.size += len(text)


class ResultStore(FileStore):
    """Results of batches. Any method may raise `Unavailable`; with an object store, also `ResultsUnavailable`."""

    async def settled_lines(self, stored: StoredBatch, kind: str) -> AsyncGenerator[SettledLine, None]:
        """Yields what became of a batch's lines, in their order: of those for its `output` file, or its `error` file.

        Lines that were never queued are among them only if they are in the object store: see `unsettled_lines`.
        """
        for chunk in await self._chunks(_key_of(kind, stored)) if stored.archived else ():
            try:
                lines = await self._read_chunk(chunk)
            except NotFound:
                async for line in self._gone_lines(stored, chunk, kind):
                    yield line
                continue
            for text in lines:
                yield _line_from(text)
        async for line in self._lines_here(stored, stored.archived or 0, stored.next):
            if _kind_of(line.outcome) == kind:
                yield line

    async def unsettled_lines(self, stored: StoredBatch) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yields number and text of the lines that were never queued, in their order, unless they were moved."""
        number = max(stored.next, stored.archived or 0)
        async for line in self._lines(keys.BATCH_INPUT + stored.key, number, apart=stored.apart):
            yield number, line
            number += 1

    async def move_results(self, stored: StoredBatch, name_of: Callable[[bytes], str | None]) -> None:
        """Moves what became of some lines into the object store, if that is where it goes and enough lines have ended.

        Once all lines of a batch have ended, all move, in several calls if they are many, and the batch's own lines
        are deleted if nobody else needs them. Only then does `step_batch` end it. May be called by several processes at
        once, and again after any error. Without a store, the batch ends with the rest of it on the queue server.

        Args:
            name_of: finds the custom_id in a line that may be wrong in any way.
        """
        if stored.archived is None or stored.batch.status not in ("in_progress", "cancelling", "finalizing"):
            return
        ending = stored.batch.status == "finalizing"
        if self.objects is None:
            if ending:
                await self._run("keep_results", stored.key)
            return
        first, most = stored.archived, stored.length if ending else stored.next
        if not ending and most - first >= MOVED_LINES:
            flying = await self._do("HKEYS", keys.BATCH_FLYING + stored.key)
            most = min([most, *map(int, flying)])
        for _ in range(MOVES):
            if first >= most or not (ending or most - first >= MOVED_LINES):
                break
            end = await self._move(stored, first, min(most, first + MOVED_LINES), name_of)
            if end is None:  # another gateway was faster
                return
            first = end
        if ending and first == stored.length and stored.apart:
            references = await self._run("release_lines", stored.key)
            await self._discard([Chunk.read(b"0", each).reference for each in references])

    async def _move(
        self, stored: StoredBatch, first: int, most: int, name_of: Callable[[bytes], str | None]
    ) -> int | None:
        """Moves the lines from `first` to before `most`, or fewer if these are large. Returns the line after them."""
        parts, end = _Parts(), first
        while end < most and parts.size < CHUNK_BYTES:
            end = await self._collect(stored, end, min(most, end + LINES_READ), parts, name_of)
        chunks = {
            kind: await self._put_lines(f"batches/{stored.key}/{kind}", first, end, lines)
            for kind, lines in parts.lines.items()
            if lines
        }
        places = [chunks[kind].stored if kind in chunks else "" for kind in KINDS]
        if await self._run("move_results", stored.key, first, end, *places):
            return end
        await self._discard([chunk.reference for chunk in chunks.values()])
        return None

    async def _collect(
        self, stored: StoredBatch, first: int, end: int, parts: _Parts, name_of: Callable[[bytes], str | None]
    ) -> int:
        """Adds what became of these lines to `parts`. Returns the line after them: `end`."""
        settled = [line async for line in self._lines_here(stored, first, min(end, stored.next))]
        with redis_call():
            async with self._redis.pipeline(transaction=False) as reading:
                for line in settled:
                    reading.hgetall(keys.job(line.details.get("job", "")))
                records = await reading.execute()
        for line, record in zip(settled, records, strict=True):
            said = {"line": line.number, "outcome": line.outcome, "details": dict(line.details)}
            if record:
                said["record"] = {name.decode(): text.decode(errors="replace") for name, text in record.items()}
            parts.add(said)
        for number in range(max(first, stored.next), end):
            try:
                text = await self._line_of(stored, number)
            except (NotFound, ResultsElsewhere):  # its custom_id is lost; the batch must end nevertheless
                text = b"?"
            if text.strip():
                parts.add({"line": number, "outcome": UNSETTLED, "details": {"custom_id": name_of(text)}})
        return end

    async def _line_of(self, stored: StoredBatch, number: int) -> bytes:
        if stored.apart:
            return await self._line_at(keys.BATCH_INPUT + stored.key, number)
        line: bytes | None = await self._do("LINDEX", keys.BATCH_INPUT + stored.key, number)
        return line or b""

    async def _lines_here(self, stored: StoredBatch, first: int, end: int) -> AsyncGenerator[SettledLine, None]:
        """Yields what the queue server has of these lines."""
        for start in range(first, end, LINES_READ):
            numbers = range(start, min(end, start + LINES_READ))
            found = await self._do("HMGET", keys.BATCH_RESULTS + stored.key, *numbers)
            for number, text in zip(numbers, found, strict=True):
                if text is not None:
                    outcome, _, details = text.partition(b" ")
                    yield SettledLine(number, outcome.decode(), json.loads(details))

    async def _gone_lines(self, stored: StoredBatch, chunk: Chunk, kind: str) -> AsyncGenerator[SettledLine, None]:
        """Yields the lines whose results were in an object that is gone, as far as the queue server knows of them."""
        async for line in self._lines_here(stored, chunk.first, min(chunk.end, stored.next)):
            if _kind_of(line.outcome) == kind:
                yield SettledLine(line.number, RESULT_GONE, line.details)
        if kind == "error":
            for number in range(max(chunk.first, stored.next), chunk.end):
                yield SettledLine(number, RESULT_GONE, {})

    async def _jobs_of(self, stored: StoredBatch) -> AsyncGenerator[list[str], None]:
        """Yields the ids of a batch's jobs, some at a time."""
        jobs = []
        async for line in self._lines_here(stored, 0, stored.next):
            jobs += [line.details["job"]] if "job" in line.details else []
            if len(jobs) == LINES_READ:
                yield jobs
                jobs = []
        yield jobs

    async def _delete_results(self, stored: StoredBatch) -> None:
        """Deletes a batch's results from the object store, and its lines if nobody else needs them."""
        found = [await self._chunks(_key_of(kind, stored)) for kind in KINDS] if stored.archived else []
        references = [chunk.reference for chunk in chain(*found)]
        if stored.apart:
            lines = await self._run("release_lines", stored.key)
            references += [Chunk.read(b"0", each).reference for each in lines]
        if references:
            await self._store().delete(references)


def _kind_of(outcome: str) -> str:
    return "output" if outcome == "completed" else "error"


def _key_of(kind: str, stored: StoredBatch) -> str:
    return f"{keys.FILE_LINES}{kind}-{stored.key}"


def _line_from(text: bytes) -> SettledLine:
    said = json.loads(text)
    record = list(chain(*moved_record(text).items()))
    return SettledLine(said["line"], said["outcome"], said["details"], job_from(record) if record else None)

"""Files of batches: those that clients send, with their lines, and what is known of those with results."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from patchforge.service.errors import NoRoom, NotFound, ResultsUnavailable
from patchforge.service.messages.batches import BatchFile
from patchforge.service.messages.room import REFERENCE_BYTES
from patchforge.service.queue import keys
from patchforge.service.queue.chunks import Chunk, ChunkStore, split_lines
from patchforge.service.queue.ids import new_id
from patchforge.service.queue.offers import Offers
from patchforge.service.queue.records import fields_of

PUSHED = 1000  # lines of a file in one command
PARALLEL = 4  # objects that are written at once
UPLOAD_SECONDS = 600  # lifetime of the lines of a file that never became complete
LINES_READ = 100  # lines of a batch in one command
LINE_BYTES = 16  # that Redis needs for a line of a file, besides the line
WAIT_SECONDS = 60  # that a client should wait for room

FILE_ID = re.compile(r"file-((?:(output|error)-)?[0-9A-Z]{26})")


@dataclass(frozen=True)
class StoredFile:
    """A file as the queue server has it. It has lines of its own, or those of a batch's results."""

    file: BatchFile
    results_of: str | None
    """Id of the batch, if it has results of one."""
    kind: str
    """`input`, `output` or `error`."""

    @property
    def number(self) -> str:
        return number_of(FILE_ID, self.file.id, "file")


class FileStore(Offers, ChunkStore):
    """Files of all tenants. Any method may raise `Unavailable`; with an object store, also `ResultsUnavailable`."""

    async def add_file(self, lines: Sequence[bytes], filename: str, tenant: str | None, ttl: int) -> BatchFile:
        """Stores a file of requests for `ttl` seconds. `lines` are what is between its line feeds.

        Raises:
            QueueFull: the queue server has no room for it.
        """
        number = new_id(self.number)
        size = sum(map(len, lines)) + len(lines) - 1
        parts = [] if self.objects is None else list(split_lines(lines))
        held = REFERENCE_BYTES * len(parts) if parts else size + LINE_BYTES * len(lines)
        outcome, *record = await self._run("admit_file", number, held, UPLOAD_SECONDS)
        self._refuse_without_room(outcome, record)
        if parts:
            chunks = await self._put_file(number, lines, parts)
            stored = [text for chunk in chunks for text in (chunk.first, chunk.stored)]
            await self._do("HSET", keys.FILE_LINES + number, *stored)
            await self._do("EXPIRE", keys.FILE_LINES + number, UPLOAD_SECONDS)
        else:
            await self._push_lines(number, lines)
        # Older versions look for `length`, and do not begin batches with lines that they cannot read.
        fields = {"purpose": "batch", "kind": "input", "filename": filename, "bytes": size}
        fields["apart" if parts else "length"] = len(lines)
        fields["requests"] = sum(1 for line in lines if line.strip())
        pairs = [part for pair in fields.items() for part in pair]
        return file_from(await self._run("add_file", number, tenant or "", ttl, *pairs)).file

    async def _push_lines(self, number: str, lines: Sequence[bytes]) -> None:
        for start in range(0, len(lines), PUSHED):
            await self._do("RPUSH", keys.FILE_LINES + number, *lines[start : start + PUSHED])
            if start == 0:
                await self._do("EXPIRE", keys.FILE_LINES + number, UPLOAD_SECONDS)

    async def _put_file(self, number: str, lines: Sequence[bytes], parts: Sequence[range]) -> list[Chunk]:
        """Stores the lines as objects: all, or if one cannot be stored, none that the store lets us delete."""
        chunks: list[Chunk] = []
        name = f"files/{number}"
        for start in range(0, len(parts), PARALLEL):
            putting = [
                self._put_lines(name, part.start, part.stop, lines[part.start : part.stop])
                for part in parts[start : start + PARALLEL]
            ]
            results = await asyncio.gather(*putting, return_exceptions=True)
            chunks += [each for each in results if isinstance(each, Chunk)]
            for failure in results:
                if isinstance(failure, BaseException):
                    await self._discard([chunk.reference for chunk in chunks])
                    await self._run("withdraw_file", number)
                    raise failure
        return chunks

    async def _discard(self, references: Sequence[Any]) -> None:
        """Deletes objects that nobody needs. If the store does not do so now, they expire there."""
        if references:
            with suppress(ResultsUnavailable):
                await self._store().delete(references)

    def _refuse_without_room(self, outcome: bytes, record: Sequence[int]) -> None:
        if outcome == b"crowded":
            self.on_no_room()
            raise no_room(*record)

    async def file(self, file_id: str, tenant: str | None) -> StoredFile:
        """Returns a file.

        Raises:
            NotFound: there is no such file, or it belongs to another tenant.
        """
        record = await self._do("HGETALL", keys.FILE + number_of(FILE_ID, file_id, "file"))
        if not record or text_of(record, b"tenant") != (tenant or ""):
            raise NotFound(f"no file {file_id}")
        return file_from([part for pair in record.items() for part in pair])

    async def files(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[BatchFile], bool]:
        """Returns a tenant's files after that id, the newest first, and whether there are more."""
        number = "" if after is None else number_of(FILE_ID, after, "file")
        index = keys.FILES_OF + (tenant or "")
        records, more = await self._run("list_owned", index, keys.FILE, number, limit)
        return [file_from(record).file for record in records], bool(more)

    async def file_lines(self, file_id: str) -> AsyncGenerator[bytes, None]:
        """Yields the lines of a file that was sent. Those of one object are in memory at a time.

        Raises:
            NotFound: some are not in the object store any more.
        """
        number = number_of(FILE_ID, file_id, "file")
        apart = bool(await self._do("HEXISTS", keys.FILE + number, "apart"))
        async for line in self._lines(keys.FILE_LINES + number, apart=apart):
            yield line

    async def _drop_file(self, stored: StoredFile) -> None:
        """Deletes a file, and its objects unless a batch needs them. If the store is away, it can be tried again."""
        references = await self._run("drop_file", stored.number)
        if references:
            await self._store().delete([Chunk.read(b"0", each).reference for each in references])
        await self._do("DEL", keys.FILE + stored.number, keys.FILE_LINES + stored.number)

    async def _lines(self, key: str, start: int = 0, *, apart: bool) -> AsyncGenerator[bytes, None]:
        if apart:
            for chunk in await self._chunks(key):
                if chunk.end > start:
                    for line in (await self._read_chunk(chunk))[max(0, start - chunk.first) :]:
                        yield line
            return
        while lines := await self._do("LRANGE", key, start, start + LINES_READ - 1):
            for line in lines:
                yield line
            start += len(lines)


def no_room(needed: int, free: int, most: int) -> NoRoom:
    """Returns the refusal of what may need so many bytes of the queue server, which has `free` of `most` left."""
    return NoRoom(
        f"the queue server has no room: this may need {megabytes(needed)}, and {megabytes(free)} of {megabytes(most)} "
        "are free; delete results that you have, or wait until some expire",
        retry_after=WAIT_SECONDS,
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def number_of(pattern: re.Pattern[str], name: str, what: str) -> str:
    """Returns the part of a file's or batch's name that keys have.

    Raises:
        NotFound: nothing can have this name.
    """
    found = pattern.fullmatch(name)
    if found is None:
        raise NotFound(f"no such {what}")
    return found[1]


def text_of(record: Mapping[bytes, bytes], name: bytes) -> str:
    return record.get(name, b"").decode(errors="replace")


def file_from(record: Sequence[bytes]) -> StoredFile:
    """Returns the file that a record describes."""
    fields = {name: value.decode(errors="replace") for name, value in fields_of(record).items()}
    file = BatchFile(
        id=f"file-{fields['id']}",
        bytes=int(fields["bytes"]) if "bytes" in fields else None,
        created_at=int(float(fields["created_at"])),
        expires_at=int(float(fields["expires_at"])),
        filename=fields["filename"],
        purpose=cast(Any, fields["purpose"]),
    )
    batch = fields.get("batch") or fields.get("results_of")
    return StoredFile(file, None if batch is None else f"batch_{batch}", fields["kind"])

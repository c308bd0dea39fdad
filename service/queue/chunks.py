"""Lines of batch files in the object store: many in each object, with a reference to each object on the queue server.

The references are a hash, `first line → "END REFERENCE"`, under a key that has a list of lines otherwise. Processes of
versions that know only the list are refused by the queue server: they must not take such a file for an empty one.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis
from ulid import ULID

from patchforge.service.errors import NotFound
from patchforge.service.queue.pictures import PictureStore
from patchforge.service.results import Reference
from patchforge.service.settings import Settings

CHUNK_LINES, CHUNK_BYTES = 1000, 1 << 20  # most of one object; a longer line has one of its own
KEPT_BYTES = 32 << 20  # of objects that a process keeps: lines are read one after the other
MOST_CURRENT = 1000  # batches whose object of the moment is remembered
MEDIA_TYPE = "application/jsonl"


@dataclass(frozen=True)
class Chunk:
    """Where the lines from `first` to before `end` are. Of results, only some of these lines are there."""

    first: int
    end: int
    reference: Reference

    @property
    def stored(self) -> str:
        """What the queue server has of it, beside the first line."""
        return f"{self.end} {self.reference}"

    @classmethod
    def read(cls, first: bytes, stored: bytes) -> Chunk:
        end, _, reference = stored.decode().partition(" ")
        return cls(int(first), int(end), Reference(reference))


class ChunkStore(PictureStore):
    """Reads and writes such objects. Any method may raise `ResultsUnavailable` too."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        super().__init__(redis, blocking, settings)
        self._kept: OrderedDict[Reference, Sequence[bytes] | None] = OrderedDict()
        """Lines of objects, the last used at the end; None: it is gone."""
        self._kept_bytes = 0
        self._current: OrderedDict[str, Chunk] = OrderedDict()
        """Key of a file or batch → the object with the line that was read last."""

    async def _chunks(self, key: str) -> list[Chunk]:
        """Returns where a file's lines are, in their order."""
        found = await self._do("HGETALL", key)
        return sorted((Chunk.read(*pair) for pair in found.items()), key=lambda chunk: chunk.first)

    async def _put_lines(self, name: str, first: int, end: int, lines: Sequence[bytes]) -> Chunk:
        """Stores lines under a name that no other attempt uses."""
        data = b"\n".join(lines)
        return Chunk(first, end, await self._store().put(f"{name}-{first}-{ULID()}.jsonl", data, MEDIA_TYPE))

    async def _read_chunk(self, chunk: Chunk) -> list[bytes]:
        """Returns the lines of an object.

        Raises:
            NotFound: it is not in the object store any more.
        """
        return (await self._store().get(chunk.reference)).split(b"\n")

    async def _read_kept(self, chunk: Chunk) -> Sequence[bytes]:
        """Returns the same, and keeps it for the next call. So it keeps that an object is gone."""
        if chunk.reference not in self._kept:
            try:
                lines: Sequence[bytes] | None = await self._read_chunk(chunk)
            except NotFound:
                lines = None
            self._keep(chunk.reference, lines)
        self._kept.move_to_end(chunk.reference)
        found = self._kept[chunk.reference]
        if found is None:
            raise NotFound("it is not in the object store any more")
        return found

    def _keep(self, reference: Reference, lines: Sequence[bytes] | None) -> None:
        if reference not in self._kept:  # else another task was faster
            self._kept[reference] = lines
            self._kept_bytes += _size(lines)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= _size(dropped)

    async def _line_at(self, key: str, number: int) -> bytes:
        """Returns a line of a file or batch; empty if there is none.

        Raises:
            NotFound: it is not in the object store any more.
        """
        chunk = self._current.pop(key, None)
        if chunk is None or not chunk.first <= number < chunk.end:
            chunk = next((each for each in await self._chunks(key) if each.first <= number < each.end), None)
        if chunk is None:
            return b""
        self._current[key] = chunk
        if len(self._current) > MOST_CURRENT:
            self._current.popitem(last=False)
        lines = await self._read_kept(chunk)
        return lines[number - chunk.first] if number - chunk.first < len(lines) else b""


def split_lines(lines: Sequence[bytes]) -> Iterator[range]:
    """Yields the numbers of the lines that share an object, in order."""
    first, size = 0, 0
    for number, line in enumerate(lines):
        if number > first and (number - first == CHUNK_LINES or size + len(line) > CHUNK_BYTES):
            yield range(first, number)
            first, size = number, 0
        size += len(line) + 1
    yield range(first, len(lines))


def moved_record(text: bytes) -> dict[bytes, bytes]:
    """Returns a job's record from the line of results that it was moved to; {} if there is none."""
    return {name.encode(): value.encode() for name, value in json.loads(text).get("record", {}).items()}


def _size(lines: Sequence[bytes] | None) -> int:
    return 100 if lines is None else sum(map(len, lines)) + 50 * len(lines)

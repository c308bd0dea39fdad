"""Batches and their files on the queue server: kept, listed, moved on and deleted. `batches.lua` has the steps."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from patchforge.service.errors import IdempotencyConflict, NoRoom, NotFound, NotReady, TooManyJobs
from patchforge.service.messages.batches import Batch, BatchFile, BatchNotes, BatchStatus, RequestCounts
from patchforge.service.queue import keys
from patchforge.service.queue.connection import MAX_OPEN_BATCHES
from patchforge.service.queue.ids import new_id
from patchforge.service.queue.offers import Offers
from patchforge.service.queue.records import fields_of

PUSHED = 1000  # lines of a file in one command
UPLOAD_SECONDS = 600  # lifetime of the lines of a file that never became complete
LINES_READ = 100  # lines of a batch in one command
LINE_BYTES = 16  # that Redis needs for a line of a file, besides the line
LEAD_MS = 5000  # a gateway that was not heard for so long feeds no batches; another one does
WAIT_SECONDS = 60  # that a client should wait for room

_FILE_ID = re.compile(r"file-((?:(output|error)-)?[0-9A-Z]{26})")
_BATCH_ID = re.compile(r"batch_([0-9A-Z]{26})")


@dataclass(frozen=True)
class StoredBatch:
    """A batch as the queue server has it."""

    batch: Batch
    tenant: str | None
    next: int
    """The first line that is neither queued nor refused."""
    length: int
    """Lines of its file, empty ones included."""
    feeding: bool
    """Whether further lines may be queued."""

    @property
    def key(self) -> str:
        return _number_of(_BATCH_ID, self.batch.id, "batch")

    def name_of(self, line: int) -> str:
        """The id of a line's request."""
        return f"batch_req_{self.key}_{line}"


@dataclass(frozen=True)
class StoredFile:
    """A file as the queue server has it. It has lines of its own, or those of a batch's results."""

    file: BatchFile
    results_of: str | None
    """Id of the batch, if it has results of one."""
    kind: str
    """`input`, `output` or `error`."""


@dataclass(frozen=True)
class SettledLine:
    """What became of a line: `outcome` is `flying`, `completed`, `failed`, `cancelled` or `refused`."""

    number: int
    outcome: str
    details: Mapping[str, Any]
    """`custom_id`; of a line with a job also `job`; of a refused one `status` and `error`."""


class BatchStore(Offers):
    """Batches and files of all tenants. Any method may raise `Unavailable`: Redis is full or silent."""

    async def add_file(self, lines: Sequence[bytes], filename: str, tenant: str | None, ttl: int) -> BatchFile:
        """Stores a file of requests for `ttl` seconds. `lines` are what is between its line feeds.

        Raises:
            QueueFull: the queue server has no room for it.
        """
        number = new_id(self.number)
        size = sum(map(len, lines)) + len(lines) - 1
        outcome, *record = await self._run("admit_file", number, size + LINE_BYTES * len(lines), UPLOAD_SECONDS)
        self._refuse_without_room(outcome, record)
        for start in range(0, len(lines), PUSHED):
            await self._do("RPUSH", keys.FILE_LINES + number, *lines[start : start + PUSHED])
            if start == 0:
                await self._do("EXPIRE", keys.FILE_LINES + number, UPLOAD_SECONDS)
        fields = {"purpose": "batch", "kind": "input", "filename": filename, "bytes": size, "length": len(lines)}
        fields["requests"] = sum(1 for line in lines if line.strip())
        pairs = [part for pair in fields.items() for part in pair]
        return _file_from(await self._run("add_file", number, tenant or "", ttl, *pairs)).file

    def _refuse_without_room(self, outcome: bytes, record: Sequence[int]) -> None:
        if outcome == b"crowded":
            self.on_no_room()
            raise no_room(*record)

    async def file(self, file_id: str, tenant: str | None) -> StoredFile:
        """Returns a file.

        Raises:
            NotFound: there is no such file, or it belongs to another tenant.
        """
        number = _number_of(_FILE_ID, file_id, "file")
        record = await self._do("HGETALL", keys.FILE + number)
        if not record or _text(record, b"tenant") != (tenant or ""):
            raise NotFound(f"no file {file_id}")
        return _file_from([part for pair in record.items() for part in pair])

    async def files(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[BatchFile], bool]:
        """Returns a tenant's files after that id, the newest first, and whether there are more."""
        number = "" if after is None else _number_of(_FILE_ID, after, "file")
        index = keys.FILES_OF + (tenant or "")
        records, more = await self._run("list_owned", index, keys.FILE, number, limit)
        return [_file_from(record).file for record in records], bool(more)

    async def file_lines(self, file_id: str) -> AsyncGenerator[bytes, None]:
        """Yields the lines of a file that was sent."""
        async for line in self._lines(keys.FILE_LINES + _number_of(_FILE_ID, file_id, "file")):
            yield line

    async def delete_file(self, file_id: str, tenant: str | None) -> None:
        """Deletes a file. With the output of a batch go its pictures. A batch that has begun has its own lines.

        Raises:
            NotFound: there is no such file, or it belongs to another tenant.
        """
        stored = await self.file(file_id, tenant)
        if stored.results_of is not None and stored.kind == "output":
            with suppress(NotFound):  # a batch that was deleted took its pictures with it
                await self._forget(await self.batch(stored.results_of, tenant), everything=False)
        number = _number_of(_FILE_ID, file_id, "file")
        await self._do("DEL", keys.FILE + number, keys.FILE_LINES + number)

    async def create_batch(
        self,
        file_id: str,
        tenant: str | None,
        *,
        endpoint: str | None,
        window: str,
        metadata: Mapping[str, str] | None,
        idempotency_key: str | None = None,
        fingerprint: str = "",
    ) -> Batch:
        """Begins a batch, or returns the one that its key was first used for. `window` is a number of hours: `24h`.

        Raises:
            NotFound: there is no such file of requests.
            TooManyJobs: the tenant has too many batches that have not ended.
            IdempotencyConflict: the key was used with another fingerprint.
            QueueFull: the queue server has no room for it and its results.
        """
        key = "" if idempotency_key is None else keys.idempotency(f"batch\0{idempotency_key}", tenant)
        fields = {"window": window, "metadata": "" if metadata is None else json.dumps(dict(metadata))}
        fields["endpoint"] = endpoint or ""
        outcome, *record = await self._run(
            "create_batch",
            new_id(self.number),
            _number_of(_FILE_ID, file_id, "file"),
            tenant or "",
            3600 * int(window[:-1]),
            key,
            sha256(fingerprint.encode()).hexdigest(),
            *(part for pair in fields.items() for part in pair),
        )
        self._refuse_without_room(outcome, record)
        if outcome == b"missing":
            raise NotFound(f"no file {file_id} with requests", field="input_file_id")
        if outcome == b"busy":
            message = f"this API key has {MAX_OPEN_BATCHES} batches that have not ended"
            raise TooManyJobs(message, retry_after=WAIT_SECONDS)
        if outcome == b"conflict":
            raise IdempotencyConflict("this Idempotency-Key was used with a different batch")
        return _batch_from(record[0]).batch

    async def batch_of_key(self, idempotency_key: str, fingerprint: str, tenant: str | None) -> Batch | None:
        """Returns the batch that a key was used for, if it is still there.

        Raises:
            IdempotencyConflict: the key was used with another fingerprint.
        """
        key = keys.idempotency(f"batch\0{idempotency_key}", tenant)
        first, known = await self._do("HMGET", key, "batch", "fingerprint")
        if first is None:
            return None
        if known != sha256(fingerprint.encode()).hexdigest().encode():
            raise IdempotencyConflict("this Idempotency-Key was used with a different batch")
        record = await self._do("HGETALL", keys.BATCH + first.decode())
        return _batch_from([part for pair in record.items() for part in pair]).batch if record else None

    async def batch(self, batch_id: str, tenant: str | None) -> StoredBatch:
        """Returns a batch.

        Raises:
            NotFound: there is no such batch, or it belongs to another tenant.
        """
        record = await self._do("HGETALL", keys.BATCH + _number_of(_BATCH_ID, batch_id, "batch"))
        if not record or _text(record, b"tenant") != (tenant or ""):
            raise NotFound(f"no batch {batch_id}")
        return _batch_from([part for pair in record.items() for part in pair])

    async def batches(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Returns a tenant's batches after that id, the newest first, and whether there are more."""
        number = "" if after is None else _number_of(_BATCH_ID, after, "batch")
        index = keys.BATCHES_OF + (tenant or "")
        records, more = await self._run("list_owned", index, keys.BATCH, number, limit)
        return [_batch_from(record).batch for record in records], bool(more)

    async def cancel_batch(self, batch_id: str, tenant: str | None) -> Batch:
        """Queues nothing more of a batch and asks its jobs to stop; leaves an ended batch alone. Returns the batch.

        Raises:
            NotFound: there is no such batch, or it belongs to another tenant.
        """
        stored = await self.batch(batch_id, tenant)
        return _batch_from(await self._run("cancel_batch", stored.key)).batch

    async def delete_batch(self, batch_id: str, tenant: str | None) -> None:
        """Deletes an ended batch, its results and its jobs.

        Raises:
            NotFound: there is no such batch, or it belongs to another tenant.
            NotReady: it has not ended.
        """
        await self._forget(await self.batch(batch_id, tenant), everything=True)

    async def _forget(self, stored: StoredBatch, *, everything: bool) -> None:
        """Deletes first what only the queue server knows of: if that fails, the caller can try again."""
        if self.objects is not None and stored.batch.ended:
            jobs: list[str] = []
            async for line in self.settled_lines(stored):
                jobs += [line.details["job"]] if "job" in line.details else []
                if len(jobs) == LINES_READ:
                    await self._delete_pictures(jobs)
                    jobs = []
            await self._delete_pictures(jobs)
        cursor = b"0"
        while True:
            cursor = await self._run("forget_batch", stored.key, cursor, int(everything))
            if cursor == b"open":
                raise NotReady("the batch has not ended: cancel it first")
            if cursor == b"0":
                return

    # For the gateway that feeds.

    async def lead_batches(self, gateway: str) -> bool:
        """Tells whether this gateway is the one that feeds; it stays so while it asks every few seconds."""
        return bool(await self._run("lead_batches", gateway, LEAD_MS))

    async def stop_leading(self, gateway: str) -> None:
        await self._run("stop_leading", gateway)
        await self._withdraw(*self._offers)

    async def open_batches(self) -> list[str]:
        """Returns the keys of all batches that have not ended, the oldest first."""
        return [number.decode() for number in await self._do("ZRANGE", keys.BATCHES_OPEN, 0, -1)]

    async def count_batches(self) -> dict[str, int]:
        """Returns status → number of batches, for those that have not ended."""
        return dict(Counter(status.decode() for status in await self._run("batch_states")))

    async def step_batch(self, key: str) -> tuple[StoredBatch | None, list[str]]:
        """Moves a batch on as far as its jobs have come. Returns it, and the outcomes of the lines that just ended."""
        record, outcomes = await self._run("step_batch", key)
        stored = _batch_from(record) if record else None
        if stored is None or not stored.feeding:
            await self._withdraw(key)
        return stored, [outcome.decode() for outcome in outcomes]

    async def batch_line(self, key: str, number: int) -> bytes:
        """Returns a line of a batch; empty if it is gone."""
        line: bytes | None = await self._do("LINDEX", keys.BATCH_INPUT + key, number)
        return line or b""

    async def settle_line(
        self, key: str, number: int, custom_id: str | None, details: Mapping[str, Any] | None
    ) -> bool:
        """Notes that a batch's next line was refused, or is empty if `details` is None. False: another gateway did."""
        result = "" if details is None else f"refused {json.dumps(dict(details))}"
        return bool(await self._run("settle_line", key, number, custom_id or "", result))

    async def note_waiting(self, stored: StoredBatch, reason: str) -> None:
        """Shows why no further line of a batch is queued at the moment."""
        if stored.batch.patchforge.waiting_for != reason:
            await self._do("HSET", keys.BATCH + stored.key, "waiting_for", reason)

    async def settled_lines(self, stored: StoredBatch) -> AsyncGenerator[SettledLine, None]:
        """Yields what became of the lines of a batch, in their order."""
        for start in range(0, stored.next, LINES_READ):
            numbers = range(start, min(stored.next, start + LINES_READ))
            for number, found in zip(
                numbers, await self._do("HMGET", keys.BATCH_RESULTS + stored.key, *numbers), strict=True
            ):
                if found is not None:
                    outcome, _, details = found.partition(b" ")
                    yield SettledLine(number, outcome.decode(), json.loads(details))

    async def unsettled_lines(self, stored: StoredBatch) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yields number and text of the lines that were never queued, in their order."""
        number = stored.next
        async for line in self._lines(keys.BATCH_INPUT + stored.key, stored.next):
            yield number, line
            number += 1

    async def _lines(self, key: str, start: int = 0) -> AsyncGenerator[bytes, None]:
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


def _number_of(pattern: re.Pattern[str], name: str, what: str) -> str:
    found = pattern.fullmatch(name)
    if found is None:
        raise NotFound(f"no such {what}")
    return found[1]


def _text(record: Mapping[bytes, bytes], name: bytes) -> str:
    return record.get(name, b"").decode(errors="replace")


def _batch_from(record: Sequence[bytes]) -> StoredBatch:
    fields = {name: value.decode(errors="replace") for name, value in fields_of(record).items()}

    def at(name: str) -> int | None:
        return int(float(fields[name])) if name in fields else None

    def file(kind: str) -> str | None:
        return f"file-{fields[f'{kind}_file']}" if f"{kind}_file" in fields else None

    status = cast(BatchStatus, fields["status"])
    batch = Batch(
        id=f"batch_{fields['id']}",
        endpoint=cast(Any, fields.get("endpoint") or None),
        input_file_id=f"file-{fields['input_file']}",
        completion_window=fields["window"],
        status=status,
        output_file_id=file("output"),
        error_file_id=file("error"),
        created_at=int(float(fields["created_at"])),
        in_progress_at=at("created_at"),
        expires_at=at("expires_at"),
        finalizing_at=at("finalizing_at"),
        completed_at=at("completed_at"),
        expired_at=at("expired_at"),
        cancelling_at=at("cancelling_at"),
        cancelled_at=at("cancelled_at"),
        request_counts=RequestCounts(
            total=int(fields["total"]), completed=int(fields["completed"]), failed=int(fields["failed"])
        ),
        metadata=json.loads(fields["metadata"]) if fields.get("metadata") else None,
        patchforge=BatchNotes(
            waiting_for=fields.get("waiting_for") if status == "in_progress" else None, kept_until=at("kept_until")
        ),
    )
    feeding = status == "in_progress" and "ending" not in fields and int(fields["next"]) < int(fields["length"])
    return StoredBatch(batch, fields["tenant"] or None, int(fields["next"]), int(fields["length"]), feeding)


def _file_from(record: Sequence[bytes]) -> StoredFile:
    fields = {name: value.decode(errors="replace") for name, value in fields_of(record).items()}
    file = BatchFile(
        id=f"file-{fields['id']}",
        bytes=int(fields["bytes"]) if "bytes" in fields else None,
        created_at=int(float(fields["created_at"])),
        expires_at=int(float(fields["expires_at"])),
        filename=fields["filename"],
        purpose=cast(Any, fields["purpose"]),
    )
    results_of = f"batch_{fields['batch']}" if "batch" in fields else None
    return StoredFile(file, results_of, fields["kind"])

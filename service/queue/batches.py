"""Batches on the queue server: begun, listed, moved on and deleted. `batches.lua` has the steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any

from patchforge.service.errors import IdempotencyConflict, NotFound, NotReady, TooManyJobs
from patchforge.service.messages.batches import Batch
from patchforge.service.queue import keys
from patchforge.service.queue.batch_records import BATCH_ID, StoredBatch, batch_from
from patchforge.service.queue.batch_results import ResultStore
from patchforge.service.queue.connection import MAX_OPEN_BATCHES
from patchforge.service.queue.files import FILE_ID, WAIT_SECONDS, number_of, text_of
from patchforge.service.queue.ids import new_id

LEAD_MS = 5000  # a gateway that was not heard for so long feeds no batches; another one does


class BatchStore(ResultStore):
    """Batches and files of all tenants. Any method may raise `Unavailable`: Redis is full or silent."""

    async def delete_file(self, file_id: str, tenant: str | None) -> None:
        """Deletes a file. With the output of a batch go its pictures. A batch that has begun has its own lines.

        Raises:
            NotFound: there is no such file, or it belongs to another tenant.
        """
        stored = await self.file(file_id, tenant)
        if stored.results_of is not None and stored.kind == "output":
            with suppress(NotFound):  # a batch that was deleted took its pictures with it
                await self._forget(await self.batch(stored.results_of, tenant), everything=False)
        await self._drop_file(stored)

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
        results_apart = {} if self.objects is None else {"archived": "0"}
        outcome, *record = await self._run(
            "create_batch",
            new_id(self.number),
            number_of(FILE_ID, file_id, "file"),
            tenant or "",
            3600 * int(window[:-1]),
            key,
            sha256(fingerprint.encode()).hexdigest(),
            *(part for pair in (fields | results_apart).items() for part in pair),
        )
        self._refuse_without_room(outcome, record)
        if outcome == b"missing":
            raise NotFound(f"no file {file_id} with requests", field="input_file_id")
        if outcome == b"busy":
            message = f"this API key has {MAX_OPEN_BATCHES} batches that have not ended"
            raise TooManyJobs(message, retry_after=WAIT_SECONDS)
        if outcome == b"conflict":
            raise IdempotencyConflict("this Idempotency-Key was used with a different batch")
        return batch_from(record[0]).batch

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
        return batch_from([part for pair in record.items() for part in pair]).batch if record else None

    async def batch(self, batch_id: str, tenant: str | None) -> StoredBatch:
        """Returns a batch.

        Raises:
            NotFound: there is no such batch, or it belongs to another tenant.
        """
        record = await self._do("HGETALL", keys.BATCH + number_of(BATCH_ID, batch_id, "batch"))
        if not record or text_of(record, b"tenant") != (tenant or ""):
            raise NotFound(f"no batch {batch_id}")
        return batch_from([part for pair in record.items() for part in pair])

    async def batches(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Returns a tenant's batches after that id, the newest first, and whether there are more."""
        number = "" if after is None else number_of(BATCH_ID, after, "batch")
        index = keys.BATCHES_OF + (tenant or "")
        records, more = await self._run("list_owned", index, keys.BATCH, number, limit)
        return [batch_from(record).batch for record in records], bool(more)

    async def cancel_batch(self, batch_id: str, tenant: str | None) -> Batch:
        """Queues nothing more of a batch and asks its jobs to stop; leaves an ended batch alone. Returns the batch.

        Raises:
            NotFound: there is no such batch, or it belongs to another tenant.
        """
        stored = await self.batch(batch_id, tenant)
        return batch_from(await self._run("cancel_batch", stored.key)).batch

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
            async for jobs in self._jobs_of(stored):
                await self._delete_pictures(jobs)
            if everything:
                await self._delete_results(stored)
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
        stored = batch_from(record) if record else None
        if stored is None or not stored.feeding:
            await self._withdraw(key)
        return stored, [outcome.decode() for outcome in outcomes]

    async def batch_line(self, stored: StoredBatch) -> bytes:
        """Returns a batch's next line; empty if it is gone from the queue server.

        Raises:
            NotFound: it is not in the object store any more.
            ResultsUnavailable: the object store cannot be used.
        """
        return await self._line_of(stored, stored.next)

    async def settle_line(
        self, key: str, number: int, custom_id: str | None, details: Mapping[str, Any] | None
    ) -> bool:
        """Notes that a batch's next line was refused, or is empty if `details` is None. False: another gateway did."""
        result = "" if details is None else f"refused {json.dumps(dict(details))}"
        return bool(await self._run("settle_line", key, number, custom_id or "", result))

    async def note_waiting(self, stored: StoredBatch, reason: str | None) -> None:
        """Shows why a batch does not go on at the moment; None: it does."""
        if stored.batch.patchforge.waiting_for == reason:
            return
        if reason is None:
            await self._do("HDEL", keys.BATCH + stored.key, "waiting_for")
        else:
            await self._do("HSET", keys.BATCH + stored.key, "waiting_for", reason)

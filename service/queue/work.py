"""The queue for workers: show what they serve, wait for a job, claim it, keep it, and end it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from ulid import ULID

from patchforge.service.errors import Unavailable
from patchforge.service.messages.events import Cancelled, Completed, Event, Expired, Failed
from patchforge.service.messages.protocol import CAPABILITIES, FIRST, OBJECT_STORE, is_pin
from patchforge.service.messages.schemas import ModelCard, Priority
from patchforge.service.queue import keys
from patchforge.service.queue.claims import (
    Claim,
    Delivery,
    Heartbeat,
    claim_arguments,
    claim_from,
    finished,
    published,
    stored,
)
from patchforge.service.queue.connection import BELL_MS, LONGEST_BLOCK, redis_call
from patchforge.service.queue.pictures import PictureStore
from patchforge.service.queue.records import announced
from patchforge.service.results import Reference
from patchforge.service.settings import Settings

ANNOUNCED = 15  # seconds until a worker's announcement expires
LOOK = 1.0  # seconds after which a worker that waits for jobs looks without a bell


class WorkQueue(PictureStore):
    """What workers do with the queue. Any method may raise `Unavailable`: Redis is full or silent."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        super().__init__(redis, blocking, settings)
        self.capabilities = CAPABILITIES if self.objects is None else CAPABILITIES | {OBJECT_STORE}
        """What the workers of this process can do. They claim no job that needs more."""
        self._unanswered: dict[str, str] = {}
        """Worker id → token of its last call for a job, if that call got no answer."""

    async def announce(self, worker_id: str, cards: Sequence[ModelCard], metrics: bytes | None = None) -> None:
        """Shows a worker's models to gateways for `ANNOUNCED` seconds. Repeat it well before they are over.

        `metrics`: its Prometheus exposition, if that is to be shown too.
        """
        plain, about = announced(cards, self.capabilities)
        # Under a key of its own: processes of protocol 0 read the cards, and exit at a field that they do not know.
        texts: list[str | bytes] = [keys.announcement(worker_id), about, keys.worker_models(worker_id), plain]
        if metrics is not None:
            texts += [keys.worker_metrics(worker_id), metrics]
        await self._run("announce", worker_id, ANNOUNCED, 2, *texts)

    async def announce_metrics(self, worker_id: str, text: bytes) -> None:
        """Shows a worker's Prometheus exposition to gateways for `ANNOUNCED` seconds."""
        await self._run("announce", worker_id, ANNOUNCED, 0, keys.worker_metrics(worker_id), text)

    async def retire(self, worker_id: str) -> None:
        """Removes a worker's announcements."""
        await self._run("retire", worker_id)

    async def claim(
        self, worker_id: str, models: Sequence[str], *, block_seconds: float, take_over: bool = False
    ) -> Claim | None:
        """Claims the most urgent waiting job of these models that needs nothing beyond `capabilities`.

        Waits up to `block_seconds` for one, then returns None. With `take_over`, also takes over the job of a worker
        that stopped responding; it looks for one only if no other worker did so in the last second.
        """
        streams, bells = self._list_streams(models), self._list_bells(models)
        give_up = time.monotonic() + block_seconds
        while True:
            claim, how = await self._take_or_return("claim", worker_id, streams, "1" if take_over else "0", *bells)
            left = give_up - time.monotonic()
            if claim or left <= 0 or not streams:
                return claim
            if how != b"more":
                await self._wait_for_bell(bells, min(left, LOOK))

    async def wait_for_job(self, models: Sequence[str], seconds: float) -> str | None:
        """Waits until a job of these models may wait for a worker. One job wakes one worker.

        Returns what to `ring` to wake another one instead; None if the time was up. A worker should also look without
        it: what rang may be lost with a worker.
        """
        return await self._wait_for_bell(self._list_bells(models), seconds)

    async def ring(self, bell: str) -> None:
        """Wakes the worker that has waited longest at this bell."""
        await self._do("RPUSH", bell, 1)
        await self._do("PEXPIRE", bell, BELL_MS)

    async def wait_for_call(self, worker_id: str, seconds: float) -> bool:
        """Waits until someone cancels a job that this worker holds. Returns False if the time was up."""
        return await self._wait_for_bell([keys.call(worker_id)], seconds) is not None

    async def _wait_for_bell(self, bells: Sequence[str], seconds: float) -> str | None:
        # Nothing is claimed meanwhile: a worker that is cancelled or killed here holds no job.
        blocking: Any = self._blocking  # its types know no bytes
        with redis_call():
            rung = await blocking.blpop(list(bells), timeout=max(0.001, min(seconds, LONGEST_BLOCK)))
        return None if rung is None else rung[0].decode()

    async def reclaim(self, worker_id: str, models: Sequence[str]) -> Claim | None:
        """Takes over a job whose worker stopped responding. Ends such jobs if cancelled or out of attempts."""
        claim, _ = await self._take_or_return("reclaim", worker_id, self._list_streams(models))
        return claim

    async def heartbeat(self, claim: Claim) -> Heartbeat:
        """Keeps a claim for another `claim_idle_seconds`, and tells its state."""
        return (await self.keep([claim]))[0]

    async def keep(self, claims: Sequence[Claim]) -> list[Heartbeat]:
        """Does the same for several claims of one worker, in one call."""
        if not claims:
            return []
        texts = [text for each in claims for text in (each.job.id, each.attempt, each.stream, each.entry_id)]
        return [Heartbeat(verdict.decode()) for verdict in await self._run("keep", claims[0].worker_id, *texts)]

    async def publish(self, claim: Claim, event: Event) -> bool:
        """Adds an event to the job's stream. Returns False if the claim is lost. Terminal events go to `finish`."""
        return (await self.deliver([published(claim, event)]))[0]

    async def put_picture(self, claim: Claim, index: int, data: bytes) -> bytes | Reference:
        """Stores an encoded picture where the settings say. Returns what `store_image` must have. Safe to repeat.

        Raises:
            ResultsUnavailable: the object store cannot be used.
        """
        if self.objects is None:
            return data
        return await self._put_picture(claim.job, index, data, f"{claim.entry_id}-{claim.attempt}")

    async def store_image(self, claim: Claim, index: int, picture: bytes | Reference) -> bool:
        """Stores a picture, or where it is, and publishes ImageReady. Returns False if the claim is lost."""
        return (await self.deliver([stored(claim, index, picture)]))[0]

    async def finish(self, claim: Claim, event: Completed | Failed | Cancelled | Expired) -> bool:
        """Ends the job with its only terminal event. Returns False if the claim is lost or the job has ended."""
        return (await self.deliver([finished(claim, event)]))[0]

    async def deliver(self, deliveries: Sequence[Delivery]) -> list[bool]:
        """Does what `publish`, `store_image` and `finish` do, for several of them, in order and in one call."""
        words = [word for each in deliveries for word in (len(each), *each)]
        return [bool(each) for each in await self._run("deliver", *words)]

    async def release(self, claim: Claim) -> bool:
        """Gives the job back: it is next in line, and the attempt does not count. Returns False if the claim is lost.

        If someone asked to cancel the job, it ends instead.
        """
        return bool(await self._run("release", *claim_arguments(claim)))

    @property
    def _special(self) -> frozenset[str]:
        """What the workers of this process can do, but not all workers can."""
        return self.capabilities - FIRST

    def _list_streams(self, models: Sequence[str]) -> list[str]:
        """Returns queue streams, most urgent first. Models are in random order, so that none starves another."""
        shuffled = random.sample(models, len(models))
        kinds = (False, True) if self._special else (False,)
        levels = (keys.RETURNED, *Priority)
        return [keys.queue(name, level, special=kind) for level in levels for kind in kinds for name in shuffled]

    def _list_bells(self, models: Sequence[str]) -> list[str]:
        kinds = (False, True) if self._special else (False,)
        pins = [need for need in self._special if is_pin(need)]
        bells = [keys.bell(name, special=kind) for kind in kinds for name in models]
        return bells + [keys.bell(name, special=True, pin=pin) for pin in pins for name in models]

    async def _take_or_return(
        self, command: str, worker_id: str, streams: Sequence[str], *options: str
    ) -> tuple[Claim | None, bytes]:
        """Runs claim or reclaim. If the caller is cancelled meanwhile, gives the job back: nobody would run it."""
        if not streams:
            return None, b"none"
        running = asyncio.ensure_future(self._run_with_token(command, worker_id, streams, *options))
        try:
            record, how = await asyncio.shield(running)
        except asyncio.CancelledError:
            with contextlib.suppress(Unavailable):
                record, how = await running
                if record:
                    await self.release(claim_from(worker_id, record, how))
            raise
        return claim_from(worker_id, record, how) if record else None, how

    async def _run_with_token(self, command: str, worker_id: str, streams: Sequence[str], *options: str) -> Any:
        """Runs claim or reclaim. If a call got no answer, the next one returns the job that it may have started."""
        token = self._unanswered.pop(worker_id, None) or str(ULID())
        can = " ".join(sorted(self._special))
        try:
            return await self._run(command, worker_id, token, can, *options, streams=streams)
        except Unavailable:
            self._unanswered[worker_id] = token
            raise

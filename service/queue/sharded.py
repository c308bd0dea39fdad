"""One queue on several queue servers, for gateways: each job, file and batch is whole on one of them.

Ids say which server that is. A server that is away costs its own jobs only: the others take new ones. Workers claim
from every server, each as if there were no other; see `service/worker/link.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from operator import is_not
from typing import Any, TypeVar

import structlog

from patchforge.service.errors import NeverRoom, NoRoom, NotFound, QueueFull, ResultsUnavailable, Unavailable
from patchforge.service.messages.batches import Batch, BatchFile
from patchforge.service.messages.events import Event
from patchforge.service.messages.schemas import GenerationRequest, Job
from patchforge.service.messages.source import Source
from patchforge.service.queue import keys
from patchforge.service.queue.batch_records import SettledLine, StoredBatch
from patchforge.service.queue.files import StoredFile
from patchforge.service.queue.ids import server_of
from patchforge.service.queue.job_queue import Backlog, JobQueue
from patchforge.service.queue.records import Served
from patchforge.service.results import ObjectStore
from patchforge.service.settings import Settings

RETRY_SECONDS = 1.0  # between attempts to reach a server that is away

log = structlog.get_logger(__name__)
T = TypeVar("T")


def connect_all(settings: Settings) -> list[JobQueue]:
    """Returns a queue on each server that the settings name. They use one client of the object store, if there is one.

    Raises:
        InvalidRequest: a certificate or key in the settings cannot be used.
    """
    queues = [JobQueue.connect(url, settings, number) for number, url in enumerate(settings.queue_urls)]
    for queue in queues[1:]:
        queue.objects = queues[0].objects
    return queues


def connect(settings: Settings) -> JobQueue | ShardedQueue:
    """Returns the queue that the settings name, for a gateway. It connects on first use.

    Raises:
        InvalidRequest: a certificate or key in the settings cannot be used.
    """
    queues = connect_all(settings)
    return queues[0] if len(queues) == 1 else ShardedQueue(queues, settings)


class ShardedQueue:
    """What gateways need of `JobQueue`, over several servers. Methods have its meaning, and raise its errors.

    What belongs to a tenant as a whole (files, batches, and, if they are set, limits) is on one server, which its name
    chooses, and so is what an idempotency key made. All other jobs go to any server.
    """

    def __init__(self, shards: Sequence[JobQueue], settings: Settings) -> None:
        self.shards = shards
        """The queue on each server, at the place that is its number."""
        self._limited = settings.rate_limit > 0 or settings.max_in_flight > 0
        self._open = [shard for shard in shards if shard.number not in settings.redis_draining] or list(shards)
        """Those that take new jobs."""
        self._away: dict[int, asyncio.Task[None]] = {}
        """Server that did not answer → what tries to reach it. Meanwhile, only calls about its own jobs go there."""
        self._known: Mapping[str, Served] = {}
        """The live workers: `_known_parts`, what each server knows, together."""
        self._known_parts: Sequence[Mapping[str, Served]] = ()
        self._last: dict[tuple[str, int], Any] = {}
        """(what was counted, server) → the last answer: its jobs are still there while it is away."""

    @property
    def objects(self) -> ObjectStore | None:
        return self.shards[0].objects

    @property
    def on_ended(self) -> Callable[[Job], None]:
        return self.shards[0].on_ended

    @on_ended.setter
    def on_ended(self, call: Callable[[Job], None]) -> None:
        for shard in self.shards:
            shard.on_ended = call

    @property
    def on_no_room(self) -> Callable[[], None]:
        return self.shards[0].on_no_room

    @on_no_room.setter
    def on_no_room(self, call: Callable[[], None]) -> None:
        for shard in self.shards:
            shard.on_no_room = call

    async def close(self) -> None:
        for probe in self._away.values():
            probe.cancel()
        await asyncio.gather(*self._away.values(), return_exceptions=True)
        await asyncio.gather(*(shard.close() for shard in self.shards))

    # Of all servers.

    async def check_server(self) -> None:
        """Raises `Unavailable` only if no server can be used."""
        await self._ask_all(lambda shard: shard.check_server())

    async def check_not_refused(self) -> None:
        await asyncio.gather(*(shard.check_not_refused() for shard in self.shards))

    async def known_workers(self, within: float = 0.0) -> Mapping[str, Served]:
        """The same object again, if nothing has changed."""
        parts = list((await self._ask_all(lambda shard: shard.known_workers(within))).values())
        if len(parts) != len(self._known_parts) or any(map(is_not, parts, self._known_parts)):
            self._known_parts = parts
            self._known = {worker: served for each in parts for worker, served in each.items()}
        return self._known

    async def workers(self) -> dict[str, Served]:
        found = await self._ask_all(lambda shard: shard.workers())
        return {worker: served for each in found.values() for worker, served in each.items()}

    async def worker_metrics(self) -> list[tuple[str, bytes]]:
        found = await self._ask_all(lambda shard: shard.worker_metrics())
        return list({worker: text for each in found.values() for worker, text in each}.items())

    async def remember(self, models: Sequence[Served], seconds: int) -> None:
        await self._ask_all(lambda shard: shard.remember(models, seconds))

    async def remembered(self) -> list[Served]:
        found = await self._ask_all(lambda shard: shard.remembered())
        by_model = {served.cards[0].name: served for each in found.values() for served in each if served.cards}
        return list(by_model.values())

    async def lost_jobs(self) -> list[str]:
        return [job_id for each in (await self._ask_all(lambda shard: shard.lost_jobs())).values() for job_id in each]

    async def backlog(self) -> Backlog:
        """A server that is away counts with its last answer, as in the next two: what waited there still waits."""
        return Backlog.together(await self._count("backlog", lambda shard: shard.backlog()))

    async def held(self) -> dict[str, int]:
        return _sum(await self._count("held", lambda shard: shard.held()))

    async def count_batches(self) -> dict[str, int]:
        return _sum(await self._count("batches", lambda shard: shard.count_batches()))

    # Of one job.

    async def submit(
        self,
        request: GenerationRequest,
        *,
        idempotency_key: str | None = None,
        tenant: str | None = None,
        **details: Any,
    ) -> Job:
        """Tries other servers if one has no room or does not answer, unless the job belongs on that one.

        A server that did not answer may have accepted the job nevertheless. Then it is drawn there too, for nobody.
        `NeverRoom` means that no server which may take the job could ever hold it.
        """
        refusal: QueueFull | Unavailable | None = None
        never: list[NeverRoom] = []
        places = await self._places_for(idempotency_key, tenant)
        for shard in places:
            submitting = shard.submit(
                request, idempotency_key=idempotency_key, tenant=tenant, tell_no_room=False, **details
            )
            try:
                return await self._ask(shard, submitting)
            except ResultsUnavailable:
                raise
            except NeverRoom as error:
                never.append(error)
            except (QueueFull, Unavailable) as error:
                refusal = refusal or error
        if refusal is None and self._goes_anywhere(idempotency_key) and len(places) < len(self._open):
            refusal = Unavailable("the queue servers with enough memory for this cannot be used at the moment")
        if isinstance(refusal, NoRoom) or refusal is None:
            self.on_no_room()
        raise refusal or max(never, key=lambda error: error.most)

    def source_needs(self, source: Source | None) -> frozenset[str]:
        return self.shards[0].source_needs(source)

    async def get(self, job_id: str) -> Job:
        return await self._ask_for(job_id, lambda shard: shard.get(job_id))

    async def cancel(self, job_id: str) -> Job:
        return await self._ask_for(job_id, lambda shard: shard.cancel(job_id))

    async def image(self, job_id: str, index: int) -> bytes:
        return await self._ask_for(job_id, lambda shard: shard.image(job_id, index))

    async def picture_links(self, job_id: str) -> dict[int, str]:
        return await self._ask_for(job_id, lambda shard: shard.picture_links(job_id))

    async def wait_for_end(
        self, job_id: str, since: float | None = None, *, pictures: bool = False
    ) -> tuple[Event, dict[int, bytes]]:
        return await self._ask_for(job_id, lambda shard: shard.wait_for_end(job_id, since, pictures=pictures))

    def watch(self, job_id: str, after: str = "0") -> AsyncGenerator[tuple[str, Event], None]:
        # Which server that is does not matter if there is no such job: any one says so.
        number = server_of(job_id)
        return self.shards[number if 0 <= number < len(self.shards) else 0].watch(job_id, after)

    # Of files and batches.

    async def add_file(self, lines: Sequence[bytes], filename: str, tenant: str | None, ttl: int) -> BatchFile:
        home = self._home(tenant or "")
        return await self._ask(home, home.add_file(lines, filename, tenant, ttl))

    async def file(self, file_id: str, tenant: str | None) -> StoredFile:
        return await self._ask_for(_number_in(file_id), lambda shard: shard.file(file_id, tenant))

    async def files(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[BatchFile], bool]:
        return await self._list(tenant, after, limit, lambda shard, *page: shard.files(tenant, *page))

    async def file_lines(self, file_id: str) -> AsyncGenerator[bytes, None]:
        async for line in self._shard_of(_number_in(file_id)).file_lines(file_id):
            yield line

    async def delete_file(self, file_id: str, tenant: str | None) -> None:
        await self._ask_for(_number_in(file_id), lambda shard: shard.delete_file(file_id, tenant))

    async def create_batch(self, file_id: str, tenant: str | None, **details: Any) -> Batch:
        """The batch is where its file is."""
        return await self._ask_for(_number_in(file_id), lambda shard: shard.create_batch(file_id, tenant, **details))

    async def batch_of_key(self, idempotency_key: str, fingerprint: str, tenant: str | None) -> Batch | None:
        home = self._home(tenant or "")
        return await self._ask(home, home.batch_of_key(idempotency_key, fingerprint, tenant))

    async def batch(self, batch_id: str, tenant: str | None) -> StoredBatch:
        return await self._ask_for(_number_in(batch_id), lambda shard: shard.batch(batch_id, tenant))

    async def batches(self, tenant: str | None, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        return await self._list(tenant, after, limit, lambda shard, *page: shard.batches(tenant, *page))

    async def cancel_batch(self, batch_id: str, tenant: str | None) -> Batch:
        return await self._ask_for(_number_in(batch_id), lambda shard: shard.cancel_batch(batch_id, tenant))

    async def delete_batch(self, batch_id: str, tenant: str | None) -> None:
        await self._ask_for(_number_in(batch_id), lambda shard: shard.delete_batch(batch_id, tenant))

    def settled_lines(self, stored: StoredBatch, kind: str) -> AsyncGenerator[SettledLine, None]:
        return self._shard_of(stored.key).settled_lines(stored, kind)

    def unsettled_lines(self, stored: StoredBatch) -> AsyncGenerator[tuple[int, bytes], None]:
        return self._shard_of(stored.key).unsettled_lines(stored)

    # How servers are chosen and asked.

    def _home(self, name: str) -> JobQueue:
        """Returns the server that a name chooses. When a server is added, only names that choose that one move."""
        return _chosen(name, self._open)

    def _goes_anywhere(self, idempotency_key: str | None) -> bool:
        """Whether any server may take a new job."""
        return not self._limited and idempotency_key is None

    async def _places_for(self, idempotency_key: str | None, tenant: str | None) -> list[JobQueue]:
        """Returns the servers that may take a new job, in the order to try them."""
        if self._goes_anywhere(idempotency_key):
            usable = [shard for shard in self._open if shard.number not in self._away] or self._open
            return random.sample(usable, len(usable))
        key = None if idempotency_key is None else keys.idempotency(idempotency_key, tenant)
        name = (tenant or "") if self._limited or key is None else key
        home = self._home(name)
        if key is not None:
            # Before a server was added, or began to drain, the name chose another one. A key that is there stays there.
            former = {_chosen(name, self.shards[:count]).number for count in range(1, len(self.shards) + 1)}
            for number in former - {home.number, *self._away}:
                with suppress(Unavailable):
                    if await self._ask(self.shards[number], self.shards[number].has_key(key)):
                        return [self.shards[number]]
        return [home]

    def _shard_of(self, number: str) -> JobQueue:
        server = server_of(number)
        if not 0 <= server < len(self.shards):
            raise NotFound(f"no job, file or batch {number}")
        return self.shards[server]

    def _list_usable(self) -> Sequence[JobQueue]:
        """Returns the servers that are not known to be away; all, if all are."""
        return [shard for shard in self.shards if shard.number not in self._away] or self.shards

    async def _ask(self, shard: JobQueue, answer: Awaitable[T]) -> T:
        """Returns the answer of a server. If there is none, the server counts as away until it can be reached."""
        try:
            return await answer
        except ResultsUnavailable:
            raise
        except Unavailable as error:
            if shard.number not in self._away:
                log.warning("a queue server cannot be used", server=shard.number, reason=error.message)
                self._away[shard.number] = asyncio.create_task(self._await(shard))
            raise

    async def _await(self, shard: JobQueue) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                await shard.check_server()
                await shard.check_accepts()
                break
            except Unavailable:
                pass
            except Exception as error:
                log.error("unexpected error", server=shard.number, exc_info=error)
        log.info("a queue server can be used again", server=shard.number)
        del self._away[shard.number]

    async def _ask_for(self, number: str, ask: Callable[[JobQueue], Awaitable[T]]) -> T:
        """Asks the server of a job, file or batch."""
        shard = self._shard_of(number)
        return await self._ask(shard, ask(shard))

    async def _ask_all(self, ask: Callable[[JobQueue], Awaitable[T]]) -> dict[int, T]:
        """Returns number → answer of the servers that can be used.

        Raises:
            Unavailable: none of them can.
        """
        asked = self._list_usable()
        answers = await asyncio.gather(*(self._ask(shard, ask(shard)) for shard in asked), return_exceptions=True)
        found: dict[int, T] = {}
        for shard, answer in zip(asked, answers, strict=True):
            if not isinstance(answer, BaseException):
                found[shard.number] = answer
            elif not isinstance(answer, Unavailable):
                raise answer
        if not found:
            raise next(answer for answer in answers if isinstance(answer, Unavailable))
        return found

    async def _count(self, what: str, count: Callable[[JobQueue], Awaitable[T]]) -> list[T]:
        for server, answer in (await self._ask_all(count)).items():
            self._last[what, server] = answer
        return [self._last[what, shard.number] for shard in self.shards if (what, shard.number) in self._last]

    async def _list(
        self,
        tenant: str | None,
        after: str | None,
        limit: int,
        read: Callable[[JobQueue, str | None, int], Awaitable[tuple[list[T], bool]]],
    ) -> tuple[list[T], bool]:
        """Returns a page of a tenant's files or batches: those of its server, then older ones elsewhere.

        Older ones on a server that is away are left out.
        """
        home = self._home(tenant or "")
        order = [home, *(shard for shard in self.shards if shard is not home)]
        if after is not None:
            order = order[order.index(self._shard_of(_number_in(after))) :]
        found: list[T] = []
        for shard in order:
            needed = shard is home or after is not None
            if not needed and shard.number in self._away:
                continue
            try:
                page, more = await self._ask(shard, read(shard, after, limit - len(found)))
            except Unavailable:
                if needed:
                    raise
                continue
            found, after = found + page, None
            if more:
                return found, True
        return found, False


def _chosen(name: str, shards: Sequence[JobQueue]) -> JobQueue:
    """Rendezvous hashing: each server has a random number for each name, and the largest wins."""
    return max(shards, key=lambda shard: sha256(f"{shard.number}\0{name}".encode("utf-8", "replace")).digest())


def _number_in(name: str) -> str:
    """Returns the id in a file's or batch's name, such as `batch_ID` or `file-output-ID`."""
    return name[-26:]


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()))


GatewayQueue = JobQueue | ShardedQueue
"""What gateways use: a queue on one server or on several."""

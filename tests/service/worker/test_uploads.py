"""Pictures and large previews take their time on the way to the object store, and are told in order."""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from typing import Any, cast

import pytest
from PIL import Image

from patchforge.service.errors import ResultsUnavailable, Unavailable
from patchforge.service.messages.events import PatchesFinished, Preview
from patchforge.service.messages.small_copies import SMALL_COPY_BYTES
from patchforge.service.queue import Claim, JobQueue
from patchforge.service.queue.claims import Delivery
from patchforge.service.results import Reference
from patchforge.service.worker import link as links
from patchforge.service.worker.link import Holder, Link
from patchforge.service.worker.outbox import Message
from patchforge.service.worker.outcomes import PictureMade
from patchforge.service.worker.pictures import shrink_preview
from patchforge.service.worker.transfers import Transfers
from patchforge.service.worker.uploads import MOST_WAITING, Uploads
from tests.patience import PATIENCE
from tests.service.queue.kit import a_preview, eventually
from tests.service.worker.jobs import job

CLAIM = Claim(job(), "w", 1, "stream", "1-1")
NOISE = Image.effect_noise((200, 200), 90).convert("RGB")


def png() -> bytes:
    buffer = BytesIO()
    NOISE.save(buffer, "PNG")
    return buffer.getvalue()


class SlowStore:
    """The queue's side of uploads: each waits until it is let through, or refused."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.gates: dict[int, asyncio.Future[None]] = {}

    async def put_picture(self, claim: Claim, index: int, data: bytes) -> Reference:
        return Reference(f"s3://b/{index}")

    async def put_preview(self, claim: Claim, preview: Preview, small: bytes) -> tuple[Preview, Reference]:
        assert len(small) <= SMALL_COPY_BYTES
        self.begun.append(preview.evaluation)
        await self.gates.setdefault(preview.evaluation, asyncio.get_running_loop().create_future())
        self.ended.append(preview.evaluation)
        return preview, Reference(f"s3://b/preview-{preview.evaluation}")

    async def has(self, evaluation: int) -> bool:
        return evaluation in self.ended

    def open(self, evaluation: int) -> None:
        self.gates.setdefault(evaluation, asyncio.get_running_loop().create_future()).set_result(None)

    def refuse(self, evaluation: int) -> None:
        gate = self.gates.setdefault(evaluation, asyncio.get_running_loop().create_future())
        gate.set_exception(ResultsUnavailable("away"))


class Bench:
    """Uploads, and what they told."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.store, self.transfers, self.told = SlowStore(), Transfers(), list[Message]()
        self.discarded = list[Message]()
        self.transfers.group = group
        self._changed = asyncio.Condition()
        self.uploads = Uploads(cast(JobQueue, self.store), self.transfers, self._tell, self.discarded.append, 50_000)

    async def _tell(self, message: Message) -> None:
        async with self._changed:
            self.told.append(message)
            self._changed.notify_all()

    def take(self, event: Preview | PatchesFinished) -> bool:
        return self.uploads.take_event(CLAIM, event.index, Message("a", event))

    def finish_picture(self, index: int = 0) -> None:
        self.uploads.take_picture(CLAIM, PictureMade("a", index, b"picture"))

    def kinds(self) -> list[Any]:
        contents = [each.content for each in self.told]
        return [each[0] if isinstance(each, tuple) else (each.type, each.evaluation) for each in contents]  # type: ignore[union-attr]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            async with self._changed:
                await self._changed.wait_for(lambda: len(self.told) >= count)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as group:
        made = Bench(group)
        yield made
        made.transfers.drop("a")


def large(evaluation: int, index: int = 0) -> Preview:
    return a_preview(evaluation, index).model_copy(update={"b64_png": b64encode(png()).decode()})


def patches(evaluation: int) -> PatchesFinished:
    return PatchesFinished(index=0, evaluation=evaluation, evaluations=9, patches=[1], times=[1.0], finished_share=1.0)


async def test_small_ones_and_patches_are_told_at_once(bench: Bench) -> None:
    assert not bench.take(a_preview(1))
    assert not bench.take(patches(1))
    assert not bench.transfers.busy


async def test_what_was_stored_for_a_dropped_job_is_discarded(bench: Bench) -> None:
    assert all(map(bench.take, (large(1), large(2))))
    bench.store.open(2)
    await eventually(lambda: bench.store.has(2))
    await asyncio.sleep(0)  # the second one waits for the first
    waiting = [task for tasks in bench.transfers._tasks.values() for task in tasks]
    bench.transfers.drop("a")
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not bench.told
    assert [each.stored for each in bench.discarded] == ["s3://b/preview-2"]


async def test_previews_that_an_outage_drops_are_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RETRY_SECONDS", 0)
    delivered: list[int] = []

    class Returning:
        """A queue that does not answer once."""

        number, reached = 0, False

        async def deliver(self, deliveries: Sequence[Delivery]) -> list[bool]:
            if not self.reached:
                self.reached = True
                raise Unavailable("away")
            delivered.append(len(deliveries))
            return [True] * len(deliveries)

    class Holding:
        """A worker that notes what it discards."""

        def __init__(self) -> None:
            self.discarded = list[Message]()
            self.discard, self.record_ended_in_queue = self.discarded.append, None

    holder = Holding()
    link = Link(cast(JobQueue, Returning()), cast(Holder, holder))
    link.claims["a"] = CLAIM
    dropped = Message("a", a_preview(1), apart=Reference("s3://b/preview-1"))
    picture = Message("a", (0, Reference("s3://b/0")))
    await link._send([dropped, Message("a", patches(1)), picture])
    assert delivered == [1]
    assert [each for each in holder.discarded if each.stored] == [dropped]


async def test_what_happens_to_a_picture_is_told_in_order(bench: Bench) -> None:
    assert all(map(bench.take, (large(1), patches(2), large(3), a_preview(4))))
    bench.finish_picture()
    bench.transfers.follow("a", lambda: bench._tell(Message("a", patches(9))))
    bench.finish_picture(1)
    await bench.until(1)
    assert bench.kinds() == [1], "another picture does not wait"
    bench.store.open(3)
    bench.store.open(1)
    await bench.until(7)
    assert bench.kinds() == [1, ("preview", 1), ("patches", 2), ("preview", 3), ("preview", 4), 0, ("patches", 9)]
    assert [each.stored for each in bench.told][1:4] == ["s3://b/preview-1", None, "s3://b/preview-3"]
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(task for tasks in bench.transfers._tasks.values() for task in tasks))
    assert not bench.take(patches(5)), "nothing is under way any more"


async def test_a_slow_store_makes_previews_fewer(bench: Bench) -> None:
    for evaluation in range(1, 10):
        assert bench.take(large(evaluation))
    assert bench.take(patches(10)), "these are small, and no watcher may miss them"
    assert bench.take(large(1, index=1)), "each picture has its own"
    for evaluation in range(1, 10):
        bench.store.open(evaluation)
    await bench.until(MOST_WAITING + 2)
    assert sorted(bench.store.begun) == sorted([1, *range(1, MOST_WAITING + 1)])
    assert ("patches", 10) in bench.kinds()


async def test_a_store_that_is_away_leaves_the_small_copy(bench: Bench) -> None:
    bench.take(large(1))
    bench.store.refuse(1)
    await bench.until(1)
    content = bench.told[0].content
    assert isinstance(content, Preview)
    assert bench.told[0].stored is None
    data = b64decode(content.b64_png)
    assert len(data) <= SMALL_COPY_BYTES
    with Image.open(BytesIO(data)) as picture:
        assert 20 < picture.width < 200


async def test_a_dropped_job_is_not_told_of(bench: Bench) -> None:
    bench.take(large(1))
    bench.finish_picture()
    bench.transfers.drop("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not bench.told
    assert not bench.uploads._under_way


def test_a_small_copy_is_as_large_as_it_may_be() -> None:
    for most in 1024, SMALL_COPY_BYTES, 1 << 20:
        small = shrink_preview(png(), most)
        assert most / 3 < len(small) <= most or len(small) == len(png())

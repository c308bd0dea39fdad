"""What a worker tells the queue arrives in order, and in few calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from patchforge.service.messages.events import Cancelled, PatchesFinished, Started
from patchforge.service.worker import outbox as module
from patchforge.service.worker.outbox import Message, Outbox
from tests.patience import PATIENCE
from tests.service.queue.kit import a_preview

STARTED, END = Message("a", Started(attempt=1, steps=4)), Message("a", Cancelled())
PATCHES = Message(
    "a", PatchesFinished(index=0, evaluation=1, evaluations=4, patches=[1], times=[1.0], finished_share=1.0)
)


class Wire:
    """Receives what an outbox sends."""

    def __init__(self) -> None:
        self.calls: list[list[Message]] = []
        self.free = asyncio.Event()
        self.free.set()
        self._changed = asyncio.Condition()

    async def send(self, messages: Sequence[Message]) -> None:
        await self.free.wait()
        async with self._changed:
            self.calls.append(list(messages))
            self._changed.notify_all()

    async def received(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(lambda: sum(map(len, self.calls)) >= count)


@asynccontextmanager
async def running(outbox: Outbox) -> AsyncIterator[None]:
    task = asyncio.create_task(outbox.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def preview(number: int, size: int = 10) -> Message:
    return Message("a", a_preview(number, size=size))


async def test_what_waits_goes_in_one_call_and_in_order() -> None:
    wire = Wire()
    outbox, messages = Outbox(wire.send), [STARTED, preview(1), Message("a", (0, b"picture")), END]
    for message in messages:
        await outbox.put(message)
    assert outbox.ends("a")
    async with running(outbox):
        await wire.received(4)
        await outbox.put(Message("b", Cancelled()))
        await wire.received(5)
    assert wire.calls == [messages, [Message("b", Cancelled())]]
    assert not outbox.ends("a")


async def test_a_call_is_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER_SECONDS", 0.0)
    wire = Wire()
    outbox = Outbox(wire.send)
    for number in range(3):
        await outbox.put(preview(number, size=module.TOGETHER_BYTES // 2))
    async with running(outbox):
        await wire.received(3)
    assert [len(call) for call in wire.calls] == [2, 1]


async def test_previews_wait_for_each_other_but_an_end_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER_SECONDS", 10 * PATIENCE)
    wire = Wire()
    outbox = Outbox(wire.send)
    async with running(outbox):
        outbox._sent = -1e9
        await outbox.put(preview(1))
        await wire.received(1)
        await outbox.put(preview(2))
        await outbox.put(preview(3))
        await outbox.put(END)
        await wire.received(4)
    assert wire.calls == [[preview(1)], [preview(2), preview(3), END]]


async def test_what_nobody_looks_at_waits_for_the_next_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 10 * PATIENCE)
    wire = Wire()
    outbox, patient = Outbox(wire.send), Message("a", PATCHES.content, patient=True)
    async with running(outbox):
        await outbox.put(patient)
        for _ in range(10):
            await asyncio.sleep(0)
        assert wire.calls == []
        await outbox.put(END)
        await wire.received(2)
    assert wire.calls == [[patient, END]]


async def test_what_nobody_looks_at_is_sent_soon_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may begin to watch a job whose next step takes minutes."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.01)
    wire = Wire()
    outbox, patient = Outbox(wire.send), Message("a", STARTED.content, patient=True)
    async with running(outbox):
        await outbox.put(patient)
        await wire.received(1)
    assert wire.calls == [[patient]]


async def test_too_many_messages_hold_up_the_engine() -> None:
    wire = Wire()
    wire.free.clear()
    outbox = Outbox(wire.send)
    async with running(outbox):
        putting = asyncio.create_task(put_all(outbox, 3 * module.MOST_WAITING))
        await asyncio.wait({putting}, timeout=0.2)
        assert not putting.done()
        assert len(outbox._waiting) <= module.MOST_WAITING
        wire.free.set()
        await asyncio.wait_for(putting, PATIENCE)


async def put_all(outbox: Outbox, count: int) -> None:
    for _ in range(count):
        await outbox.put(STARTED)

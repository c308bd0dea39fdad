"""A scripted worker in place of a real one, a gateway to run, and helpers for both."""

from __future__ import annotations

import asyncio
import math
import struct
import time
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from patchforge.service.gateway.app import Gateway
from patchforge.service.messages.events import Cancelled, Completed, Failed, Preview, Started
from patchforge.service.messages.samplers import DualLoop, Euler
from patchforge.service.messages.schemas import ImageReport, JobError, ModelCard, SavingsReport
from patchforge.service.queue import Claim, Heartbeat, JobQueue
from patchforge.service.queue.work import ANNOUNCED
from tests.patience import PATIENCE

ROWS, COLUMNS = 2, 3
PATCHES = ROWS * COLUMNS
CARDS = [
    ModelCard(
        name="tiny-text",
        kind="text",
        width=48,
        height=32,
        grid=(ROWS, COLUMNS),
        sampler=DualLoop(quantile=0.5),
        steps=8,
        guidance=3.0,
        licence="Apache-2.0",
        created=1_700_000_000,
        description="draws words",
    ),
    ModelCard(
        name="tiny-class",
        kind="class",
        width=16,
        height=16,
        grid=(ROWS, COLUMNS),
        classes=["cat", "grinning face"],
        sampler=Euler(),
        steps=4,
        guidance=1.0,
        licence="Apache-2.0",
        created=1_700_000_001,
    ),
]


def png(seed: int) -> bytes:
    """A one-pixel PNG whose grey is the seed's last byte, without an imaging library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, seed % 256]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class ScriptedWorker:
    """Claims jobs like a real worker and plays the same script for each.

    Clear `curtain` to hold jobs after their first preview. A prompt of "fail" fails.
    """

    def __init__(self, queue: JobQueue, cards: Sequence[ModelCard] = CARDS, name: str = "scripted") -> None:
        self.queue = queue
        self.cards = cards
        self.name = name
        self.curtain = asyncio.Event()
        self.curtain.set()
        self.played = 0
        self.evaluations = 8
        """Of 8 that each picture might have."""
        self.lowered_by: Literal["load"] | None = None
        self.digest: str | None = None
        """Both are what the reports say."""
        self._jobs: asyncio.Queue[str] = asyncio.Queue()
        self._scenes: set[asyncio.Task[None]] = set()

    async def next_job(self) -> str:
        """The id of the next job, after its first preview."""
        return await asyncio.wait_for(self._jobs.get(), PATIENCE)

    async def run(self) -> None:
        announced = -math.inf
        try:
            while True:
                if time.monotonic() > announced + ANNOUNCED / 3:
                    announced = time.monotonic()
                    await self.queue.announce(self.name, self.cards)
                claim = await self.queue.claim(self.name, [card.name for card in self.cards], block_seconds=0.1)
                if claim is not None:
                    self._scenes.add(asyncio.create_task(self._play(claim)))
        finally:
            for scene in self._scenes:
                scene.cancel()
            await asyncio.gather(*self._scenes, return_exceptions=True)

    async def _play(self, claim: Claim) -> None:
        request = claim.job.request
        self.played += 1
        await self.queue.publish(claim, Started(attempt=claim.attempt, steps=request.steps or 0))
        if request.prompt == "fail":
            await self.queue.finish(
                claim, Failed(error=JobError(code="out_of_memory", message="the picture is too big"))
            )
            return
        for evaluation in range(1, self.evaluations + 1):
            if request.previews:
                for index in range(request.n):
                    await self.queue.publish(claim, preview(index, evaluation))
            if evaluation == 1:
                self._jobs.put_nowait(claim.job.id)
            if evaluation == 1 and not await self._may_go_on(claim):
                await self.queue.finish(claim, Cancelled())
                return
        for index in range(request.n):
            picture = await self.queue.put_picture(claim, index, png((request.seed or 0) + index))
            await self.queue.store_image(claim, index, picture)
        told = report(request.seed or 0, request.n).model_copy(update=self._said())
        await self.queue.finish(claim, Completed(report=told))

    def _said(self) -> dict[str, str | None]:
        return {"lowered_by": self.lowered_by, "model_digest": self.digest}

    async def _may_go_on(self, claim: Claim) -> bool:
        while (beat := await self.queue.heartbeat(claim)) is Heartbeat.OK:
            if self.curtain.is_set():
                return True
            await asyncio.sleep(0.02)
        return beat is Heartbeat.OK


def preview(index: int, evaluation: int) -> Preview:
    return Preview(
        index=index,
        evaluation=evaluation,
        evaluations=8,
        times=[evaluation / 8] * PATCHES,
        finished_share=0.5,
        patch_evaluations=evaluation * 4,
        dense_patch_evaluations=evaluation * 6,
        b64_png=b64encode(png(evaluation)).decode(),
    )


def report(seed: int, n: int) -> SavingsReport:
    image = {"patch_evaluations": 32, "dense_patch_evaluations": 48}
    lists = {"difficulty": [0.25] * PATCHES, "finished_at": [8] * PATCHES}
    return SavingsReport(
        patches=PATCHES,
        grid_rows=ROWS,
        grid_columns=COLUMNS,
        patch_evaluations=32 * n,
        dense_patch_evaluations=48 * n,
        savings_ratio=1 / 3,
        queue_seconds=0.1,
        duration_seconds=0.2,
        time_to_first_preview_seconds=0.15,
        prompt_tokens=5,
        images=[ImageReport(seed=seed + index, **image, **lists) for index in range(n)],
    )


@asynccontextmanager
async def running(gateway: Gateway) -> AsyncIterator[Gateway]:
    """Runs the gateway inside the `async with` block; `stop` may end it sooner."""

    async def rest_of_its_life() -> None:
        await gateway.main_loop()
        await gateway.shutdown()

    await gateway.startup()
    living = asyncio.create_task(rest_of_its_life())
    try:
        yield gateway
    finally:
        gateway.stop()
        await living


async def ended(queue: JobQueue, job_id: str) -> str:
    """Waits for a job's terminal event and returns its type."""
    kind = "none"
    async with asyncio.timeout(PATIENCE):
        async for _, event in queue.watch(job_id):
            kind = event.type
    return kind

"""After a pause, a worker takes over its own job: answers about its old claim must not make it drop the new one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from patchforge.model.pipeline import Pipeline
from patchforge.service.messages.events import Completed, Started
from patchforge.service.queue import Claim, Heartbeat, JobQueue
from patchforge.service.queue.claims import Delivery
from patchforge.service.settings import Settings
from patchforge.service.worker.outcomes import Outcome
from patchforge.service.worker.worker import Worker
from tests.service.queue.kit import eventually, silenced
from tests.service.worker.jobs import request, slow_down
from tests.service.worker.test_worker import BUDGETS, events, first, running


@pytest.fixture
def worker(settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline]) -> Worker:
    return Worker(settings.model_copy(update={"preview_interval_seconds": 0.0}), [queue], pipelines, BUDGETS)


@pytest.mark.parametrize("overtaking", ["deliver", "keep"])
async def test_a_refusal_does_not_overtake_the_news_that_the_job_is_ours_again(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch, overtaking: str
) -> None:
    """The server takes the claim first; the worker hears of what it refused afterwards first."""
    claim, deliver, keep, step = queue.claim, queue.deliver, queue.keep, worker.engine.step
    taken, refused, heard = asyncio.Event(), asyncio.Event(), asyncio.Event()
    steps: list[None] = []

    async def late_claim(*args: Any, **options: Any) -> Claim | None:
        found = await claim(*args, **options)
        if found is not None and found.taken_over:
            taken.set()
            await refused.wait()
            before = len(steps)  # in two more steps, the worker looks at what it heard
            await eventually(lambda: acted(found, before))
            heard.set()
        return found

    async def acted(found: Claim, before: int) -> bool | None:
        return len(steps) >= before + 2 or found.job.id not in worker.claims or None

    async def watched_deliver(deliveries: Sequence[Delivery]) -> list[bool]:
        if overtaking != "deliver" and taken.is_set():
            await heard.wait()
        results = await deliver(deliveries)
        if overtaking == "deliver" and taken.is_set() and not all(results):
            refused.set()
        return results

    async def watched_keep(claims: Sequence[Claim]) -> list[Heartbeat]:
        await (taken if overtaking == "keep" else heard).wait()  # not before: the job would not look abandoned
        verdicts = await keep(claims)
        refused.set()
        return verdicts

    def watched_step() -> list[Outcome]:
        steps.append(None)
        return step()

    monkeypatch.setattr(queue, "claim", late_claim)
    monkeypatch.setattr(queue, "deliver", watched_deliver)
    monkeypatch.setattr(queue, "keep", watched_keep)
    monkeypatch.setattr(worker.engine, "step", watched_step)
    slow_down(worker, monkeypatch, until=heard.is_set)
    async with running(worker):
        job = await queue.submit(request(steps=100, sampler={"name": "dual_loop", "inner_steps": 4}))
        await first(queue, job.id, Started)
        await silenced(queue, worker.claims[job.id])
        await heard.wait()
        seen = await events(queue, job.id)
    assert isinstance(seen[-1], Completed)
    assert [event.attempt for event in seen if isinstance(event, Started)] == [1], "it went on, and did not begin anew"
    assert (await queue.get(job.id)).attempt == 2
    assert "patchforge_claims_lost_total{" not in worker.metrics.exposition().decode()

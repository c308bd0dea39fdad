"""Time and load over the protocols: asked for here, kept by a real worker, and told in the report."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest

from patchforge.model.pipeline import Pipeline
from patchforge.service.errors import TooLittleTime
from patchforge.service.gateway.defaults import fill_defaults, is_degradable
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.gateway.rpc.convert import generation_from_proto, generation_to_proto
from patchforge.service.messages.samplers import Adaptive
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, PathChange
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from patchforge.service.queue.records import Served
from patchforge.service.settings import Settings
from patchforge.service.worker import pacer
from patchforge.service.worker.pace import Speed
from patchforge.service.worker.worker import Worker
from tests.service.gateway.harness import CARDS, ScriptedWorker
from tests.service.queue.kit import eventually

ASKED = {"model": "tiny-class", "class_label": "cat", "seed": 3, "previews": False}
PATH = [{"evaluation": 1, "steps": 0}]


@pytest.fixture
async def drawer(settings: Settings, pipelines: dict[str, Pipeline]) -> AsyncIterator[Worker]:
    """A real worker that has drawn a picture, so that it knows its speed, and whose load lowers whatever may be."""
    own = JobQueue.connect(settings.redis_url or "", settings)
    worker = Worker(settings, [own], pipelines, dict.fromkeys(pipelines, 4096))
    worker.pacer.target = 1e-9
    task = asyncio.create_task(worker.run())
    yield worker
    worker.draining.set()
    await task
    await own.close()


async def drawn(http: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], bytes]:
    """The ended job and its picture."""

    async def submitted() -> httpx.Response | None:
        reply = await http.post("/v1/jobs", json=ASKED | fields)
        return None if reply.status_code == 503 else reply  # before the worker has announced itself

    job_id = (await eventually(submitted)).raise_for_status().json()["id"]
    await http.get(f"/v1/jobs/{job_id}/events")
    job = (await http.get(f"/v1/jobs/{job_id}")).json()
    return job, (await http.get(f"/v1/jobs/{job_id}/image")).content


async def test_over_rest_load_lowers_the_default_and_nothing_else(http: httpx.AsyncClient, drawer: Worker) -> None:
    await drawn(http)
    lowered, picture = await drawn(http, quality="standard", metadata=False)
    assert lowered["report"]["lowered_by"] == "load"
    path = lowered["report"]["images"][0]["path"]
    assert path
    asked = {name: lowered["request"][name] for name in ("sampler", "steps")}
    repeated, again = await drawn(http, path=path, metadata=False, **asked)
    assert again == picture
    assert "lowered_by" not in repeated["report"]
    fixed, usual = await drawn(http, quality="standard", degrade=False, metadata=False)
    assert "lowered_by" not in fixed["report"]
    assert usual != picture
    named, same = await drawn(http, metadata=False, **asked)
    assert "lowered_by" not in named["report"]
    assert same == usual
    told = drawer.metrics.exposition().decode()
    assert 'patchforge_requests_degraded_total{model="tiny-class",reason="load"} 1.0' in told
    assert 'patchforge_predicted_error_count{model="tiny-class"} 2.0' in told, "it was drawn again from its path"
    timed, same = await drawn(http, finish_within_seconds=86400, metadata=False, **asked)
    assert timed["report"]["finished_in_time"] is True

    async def counted() -> bool | None:  # after the job's end is told
        sample = 'patchforge_requests_in_time_total{met="yes",model="tiny-class"} 1.0'
        return sample in drawer.metrics.exposition().decode() or None

    await eventually(counted)
    assert same == usual


async def test_over_grpc_what_would_take_longer_is_refused_with_the_time_it_would_take(
    http: httpx.AsyncClient, stub: pb_grpc.ImageServiceStub, drawer: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacer, "RECENT_SECONDS", math.inf)
    await drawn(http)
    drawer.pacer.speeds["tiny-class"] = slow = Speed(decode=0.1)
    for _ in range(9):
        slow.evaluated(100, 1e6)

    async def announced() -> bool | None:
        models = (await stub.ListModels(pb.ListModelsRequest())).models
        return any(model.least_seconds > 1000 for model in models) or None

    await eventually(announced)
    wanted = pb.Generation(**ASKED, finish_within_seconds=5)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.SubmitJob(pb.SubmitJobRequest(generation=wanted))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "seconds" in (refused.value.details() or "")
    trailing = dict(refused.value.trailing_metadata() or ())
    assert (trailing["error-code"], trailing["error-field"]) == ("too_little_time", "finish_within_seconds")
    reply = await http.post("/v1/jobs", json=ASKED | {"finish_within_seconds": 5})
    assert (reply.status_code, reply.json()["code"]) == (503, "too_little_time")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"finish_within_seconds": 0}, "finish_within_seconds"),
        ({"finish_within_seconds": 1, "degrade": False}, "degrade"),
        ({"finish_within_seconds": 1, "deterministic": True}, "deterministic"),
        ({"finish_within_seconds": 1, "path": PATH}, "path"),
        ({"path": [{"evaluation": 1, "steps": 1, "tolerance": -1}]}, "path.0.tolerance"),
    ],
)
async def test_what_contradicts_itself_is_refused(
    http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, Any], field: str
) -> None:
    reply = await http.post("/v1/jobs", json=ASKED | fields)
    assert reply.status_code == 422
    assert reply.json()["field"] == field


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"quality": "high"}, True),
        ({"guidance": 2.0, "budget": 900, "degrade": True}, True),
        ({"finish_within_seconds": 2.0}, True),
        ({"degrade": False}, False),
        ({"sampler": "adaptive"}, False),
        ({"steps": 9}, False),
        ({"path": PATH}, False),
        ({"deterministic": True}, False),
    ],
)
async def test_load_may_lower_what_the_request_does_not_fix(
    http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, Any], may: bool
) -> None:
    assert is_degradable(GenerationRequest.model_validate({"prompt": "x"} | fields)) is may
    await http.post("/v1/jobs", json={"model": "tiny-text", "prompt": "x"} | fields)
    assert (await worker.queue.get(await worker.next_job())).degradable is may


def test_the_record_that_older_workers_read_says_nothing_of_it() -> None:
    filled = fill_defaults(GenerationRequest(prompt="x", degrade=False), CARDS[0])
    assert "degrade" not in filled.model_dump_json()


def test_the_least_time_of_any_worker_counts_and_an_unknown_one_accepts() -> None:
    def fleet(*seconds: float | None) -> Fleet:
        return Fleet([Served([CARDS[0].model_copy(update={"least_seconds": each})]) for each in seconds])

    request = GenerationRequest(model=CARDS[0].name, prompt="x", n=2, finish_within_seconds=5.0)
    fleet(9.0, 2.5).check_time(request)
    fleet(9.0, None).check_time(request)
    fleet().check_time(request)
    with pytest.raises(TooLittleTime, match="6 seconds"):
        fleet(9.0, 6.0).check_time(request)
    fleet(9.0).check_time(GenerationRequest(model=CARDS[0].name, prompt="x"))


def test_pictures_of_one_request_take_what_each_further_one_adds_and_small_ones_their_share() -> None:
    own = CARDS[0].model_copy(update={"grid": (4, 4)})
    smaller = [(own.width // 2, own.height)]
    card = own.model_copy(update={"least_seconds": 2.0, "least_seconds_more": 0.5, "sizes": smaller})

    def least(n: int, width: int = own.width) -> float:
        return _told(card, {"n": n, "width": width, "height": own.height})

    assert (least(1), least(4)) == (2.0, 3.5)
    assert (least(1, own.width // 2), least(2, own.width // 2), least(6, own.width // 2)) == (1.0, 2.0, 3.0)
    Fleet([Served([card])]).check_time(GenerationRequest(model=own.name, prompt="x", n=4, finish_within_seconds=3.6))


@pytest.mark.parametrize(
    ("wish", "seconds"),
    [
        ({}, 2.0),
        ({"steps": 2}, 0.5),
        ({"steps": 2, "n": 3}, 0.625),
        ({"steps": 16}, 2.0),
        ({"guidance": 1.0}, 1.0),
        ({"steps": 4, "guidance": 1.0}, 0.5),
        ({"budget": 20}, 0.4),
        ({"budget": 20, "steps": 1}, 0.25),
        ({"budget": 1000}, 2.0),
        ({"width": 32, "height": 64, "budget": 20}, 0.4),
        ({"sampler": "euler", "steps": 2}, 1.28),
        ({"sampler": "euler", "steps": 2, "guidance": 1.0}, 0.64),
    ],
)
def test_fewer_steps_or_a_smaller_budget_than_the_models_own_choice_take_less(
    wish: dict[str, Any], seconds: float
) -> None:
    """Otherwise what could be met would be refused."""
    chosen = {"grid": (4, 4), "sampler": Adaptive(), "steps": 8, "guidance": 2.0, "usual_patch_evaluations": 100}
    measured = {"least_seconds": 2.0, "least_seconds_more": 0.25, "sizes": [(32, 64)]}
    card = CARDS[0].model_copy(update={"width": 64, "height": 64} | chosen | measured)
    assert _told(card, wish) == pytest.approx(seconds, abs=0.051)
    waiting = card.model_copy(update={"least_seconds": 12.0, "usual_seconds": 2.0})
    assert _told(waiting, wish) == pytest.approx(10 + seconds, abs=0.51), "others come first all the same"


def _told(card: ModelCard, wish: dict[str, Any]) -> float:
    """The time that is told when there is none."""
    with pytest.raises(TooLittleTime) as refused:
        Fleet([Served([card])]).check_time(
            GenerationRequest.model_validate({"model": card.name, "prompt": "x", "finish_within_seconds": 1e-9} | wish)
        )
    return float(refused.value.message.split()[-2])


def test_all_of_it_survives_grpc() -> None:
    request = GenerationRequest(prompt="x", finish_within_seconds=2.5)
    assert generation_from_proto(generation_to_proto(request)) == request
    fixed = GenerationRequest(prompt="x", degrade=False, path=[PathChange(evaluation=1, steps=2, tolerance=0.0)])
    assert generation_from_proto(generation_to_proto(fixed)).path == fixed.path
    assert generation_from_proto(generation_to_proto(fixed)).degrade is False

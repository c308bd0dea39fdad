"""Which bundle a model is, over every protocol; requests that pin one; and two bundles under one name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest

from patchforge.service.errors import NotFound, TooLittleTime
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.batches import feeder
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.gateway.rpc.convert import event_to_proto, generation_from_proto, generation_to_proto
from patchforge.service.messages.events import Completed
from patchforge.service.messages.protocol import digest_need
from patchforge.service.messages.schemas import GenerationRequest, ModelCard
from patchforge.service.pb.inference import grpc_inference_service_pb2 as inference_pb
from patchforge.service.pb.inference import grpc_inference_service_pb2_grpc as inference_grpc
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from patchforge.service.queue.records import Served
from patchforge.service.settings import Settings
from tests.service.gateway.batches.kit import begin, drawn, native, results, until, waiting_for
from tests.service.gateway.harness import CARDS, ScriptedWorker, report

OLD, NEW, NOWHERE = "0" * 64, "1" * 64, "2" * 64
WISH = {"model": "tiny-text", "prompt": "apple", "model_digest": OLD}
Ask = Callable[[httpx.AsyncClient, grpc.aio.Channel, str], Awaitable[Any]]


def bundle(digest: str, created: int, **fields: Any) -> ModelCard:
    return CARDS[0].model_copy(update={"digest": digest, "created": created, **fields})


OLDER, NEWER = bundle(OLD, 1), bundle(NEW, 2, steps=9)


@asynccontextmanager
async def serving(settings: Settings, card: ModelCard) -> AsyncIterator[ScriptedWorker]:
    """Runs a worker with one bundle."""
    own = JobQueue.connect(settings.redis_url or "", settings)
    own.capabilities |= {digest_need(card.digest or "")}
    await own.announce(f"with {card.digest}", [card])
    scripted = ScriptedWorker(own, [card], f"with {card.digest}")
    playing = asyncio.create_task(scripted.run())
    try:
        yield scripted
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        await own.retire(scripted.name)
        await own.close()


@pytest.fixture
async def old(settings: Settings, queue: JobQueue) -> AsyncIterator[ScriptedWorker]:
    async with serving(settings, OLDER) as worker:
        yield worker


@pytest.fixture
async def new(settings: Settings, queue: JobQueue) -> AsyncIterator[ScriptedWorker]:
    async with serving(settings, NEWER) as worker:
        yield worker


async def rest(http: httpx.AsyncClient, channel: grpc.aio.Channel, digest: str) -> httpx.Response:
    return await http.post("/v1/jobs", json=WISH | {"model_digest": digest})


async def openai(http: httpx.AsyncClient, channel: grpc.aio.Channel, digest: str) -> httpx.Response:
    return await http.post("/v1/images/generations", json=WISH | {"model_digest": digest})


async def inference(http: httpx.AsyncClient, channel: grpc.aio.Channel, digest: str) -> httpx.Response:
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["apple"]}
    pin = {"name": "model_digest", "datatype": "BYTES", "shape": [1], "data": [digest]}
    wanted = {"inputs": [prompt, pin], "outputs": [{"name": "seed"}]}
    return await http.post("/v2/models/tiny-text/infer", json=wanted)


@pytest.mark.parametrize("ask", [rest, openai, inference])
class TestAPin:
    async def test_decides_who_draws(
        self, http: httpx.AsyncClient, channel: grpc.aio.Channel, old: ScriptedWorker, new: ScriptedWorker, ask: Ask
    ) -> None:
        for _ in range(3):
            (await ask(http, channel, OLD)).raise_for_status()
            await old.next_job()
        assert (old.played, new.played) == (3, 0)

    async def test_of_a_bundle_that_nobody_serves_is_refused(
        self, http: httpx.AsyncClient, channel: grpc.aio.Channel, old: ScriptedWorker, ask: Ask
    ) -> None:
        answer = await ask(http, channel, NOWHERE)
        assert answer.status_code == 404
        assert f"no worker serves tiny-text with this digest; served: {OLD}" in answer.text
        assert old.played == 0


class TestOverGrpc:
    async def test_a_pin_decides_who_draws(
        self, stub: pb_grpc.ImageServiceStub, old: ScriptedWorker, new: ScriptedWorker
    ) -> None:
        job = (await stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(**WISH)))).job
        assert await old.next_job() == job.id
        assert job.generation.model_digest == OLD
        assert new.played == 0

    async def test_of_a_bundle_that_nobody_serves_is_refused(
        self, stub: pb_grpc.ImageServiceStub, old: ScriptedWorker
    ) -> None:
        wanted = pb.Generation(**WISH | {"model_digest": NOWHERE})
        with pytest.raises(grpc.RpcError) as refused:
            await stub.SubmitJob(pb.SubmitJobRequest(generation=wanted))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        trailing = dict(refused.value.trailing_metadata() or ())
        assert (trailing["error-code"], trailing["error-field"]) == ("not_found", "model_digest")

    async def test_an_empty_pin_is_none(self, stub: pb_grpc.ImageServiceStub, new: ScriptedWorker) -> None:
        wanted = pb.Generation(prompt="apple", model_digest="")
        job = (await stub.SubmitJob(pb.SubmitJobRequest(generation=wanted))).job
        assert not job.generation.HasField("model_digest")

    async def test_models_and_reports_tell_their_bundle(
        self, stub: pb_grpc.ImageServiceStub, channel: grpc.aio.Channel, new: ScriptedWorker
    ) -> None:
        [model] = (await stub.ListModels(pb.ListModelsRequest())).models
        assert model.digest == NEW
        told = inference_grpc.GRPCInferenceServiceStub(channel).ModelMetadata
        metadata = await told(inference_pb.ModelMetadataRequest(name="tiny-text"))
        assert dict(metadata.properties) == {"digest": NEW}
        done = Completed(report=report(1, 1).model_copy(update={"model_digest": NEW}))
        assert event_to_proto("1-0", done).completed.report.model_digest == NEW

    def test_a_request_survives_the_conversion(self) -> None:
        request = GenerationRequest.model_validate(WISH)
        assert generation_from_proto(generation_to_proto(request)) == request


class TestTwoBundlesUnderOneName:
    async def test_the_newer_one_describes_it_and_both_are_listed(
        self, http: httpx.AsyncClient, old: ScriptedWorker, new: ScriptedWorker
    ) -> None:
        [listed] = (await http.get("/v1/models")).json()["data"]
        assert (await http.get("/v1/models/tiny-text")).json() == listed
        assert (listed["patchforge"]["digest"], listed["patchforge"]["digests"]) == (NEW, [OLD, NEW])
        assert (await http.get("/v2/models/tiny-text")).json()["properties"] == {"digest": NEW}

    async def test_a_pin_alone_names_the_model_and_gets_its_own_defaults(
        self, http: httpx.AsyncClient, old: ScriptedWorker, new: ScriptedWorker
    ) -> None:
        for digest, steps in ((OLD, 8), (NEW, 9)):
            job = (await http.post("/v1/jobs", json={"prompt": "apple", "model_digest": digest})).json()
            assert (job["request"]["model"], job["request"]["steps"]) == ("tiny-text", steps)

    async def test_are_told_once_in_the_log_and_counted(
        self,
        settings: Settings,
        gateway: Gateway,
        http: httpx.AsyncClient,
        old: ScriptedWorker,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        async def digests() -> list[str]:
            return re.findall(r'^patchforge_model_digests{model="tiny-text"} (.*)$', await scraped(http), re.MULTILINE)

        await gateway.tick()
        assert await digests() == ["1.0"]
        async with serving(settings, NEWER):
            for _ in range(3):
                await gateway.tick()
            assert await digests() == ["2.0"]
        await gateway.tick()
        assert await digests() == ["1.0"]
        said = capsys.readouterr().out
        assert said.count("workers serve different bundles under one name") == 1
        assert said.count("workers serve one bundle under this name again") == 1
        assert OLD in said
        assert NEW in said


async def scraped(http: httpx.AsyncClient) -> str:
    return (await http.get("/metrics")).text


@pytest.mark.parametrize("pin", ["", "0" * 63, "0" * 65, "G" * 64, OLD.replace("0", "A"), 7, [OLD]])
async def test_what_is_no_digest_is_refused(http: httpx.AsyncClient, old: ScriptedWorker, pin: Any) -> None:
    answer = await http.post("/v1/jobs", json=WISH | {"model_digest": pin})
    assert (answer.status_code, answer.json()["field"]) == (422, "model_digest")


async def test_a_model_that_does_not_have_the_pin_is_not_found(http: httpx.AsyncClient, old: ScriptedWorker) -> None:
    answer = await http.post("/v1/jobs", json=WISH | {"model": "other"})
    assert (answer.status_code, answer.json()["field"]) == (404, "model")


async def test_a_report_tells_the_bundle_that_drew(
    http: httpx.AsyncClient, queue: JobQueue, old: ScriptedWorker
) -> None:
    old.curtain.clear()
    job_id = (await http.post("/v1/jobs", json=WISH)).json()["id"]
    await old.next_job()
    assert "report" not in {name for name, value in (await http.get(f"/v1/jobs/{job_id}")).json().items() if value}
    old.digest = OLD
    old.curtain.set()
    async for _ in queue.watch(job_id):
        pass
    assert (await http.get(f"/v1/jobs/{job_id}")).json()["report"]["model_digest"] == OLD
    events = (await http.get(f"/v1/jobs/{job_id}/events")).text
    assert f'"model_digest":"{OLD}"' in events.splitlines()[-2]


@pytest.mark.parametrize("line", [drawn, native])
class TestABatch:
    async def test_may_pin_its_bundle(
        self, http: httpx.AsyncClient, old: ScriptedWorker, new: ScriptedWorker, line: Callable[..., dict[str, Any]]
    ) -> None:
        batch = await begin(http, *(line(str(number), model_digest=OLD) for number in range(3)))
        assert (await until(http, batch))["request_counts"]["completed"] == 3
        assert (old.played, new.played) == (3, 0)

    async def test_waits_for_the_bundle_while_workers_come_and_go(
        self,
        http: httpx.AsyncClient,
        settings: Settings,
        new: ScriptedWorker,
        line: Callable[..., dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(feeder, "RESTART_SECONDS", 3600)
        batch = await begin(http, line("0", model_digest=OLD))
        await waiting_for(http, batch, "with this digest")
        async with serving(settings, OLDER):
            assert (await until(http, batch))["request_counts"]["completed"] == 1

    async def test_is_refused_what_nobody_serves_for_long(
        self,
        http: httpx.AsyncClient,
        new: ScriptedWorker,
        line: Callable[..., dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(feeder, "RESTART_SECONDS", 0)
        batch = await until(http, await begin(http, line("0", model_digest=NOWHERE)))
        refused = (await results(http, batch, "error"))["0"]["response"]
        assert refused["status_code"] == 404
        assert "with this digest" in str(refused["body"])


class TestFleet:
    slow = NEWER.model_copy(update={"least_seconds": 9.0})
    fleet = Fleet([Served([OLDER]), Served([slow])])

    def test_time_is_that_of_the_pinned_bundle(self) -> None:
        wish = GenerationRequest(model="tiny-text", prompt="x", finish_within_seconds=5.0)
        self.fleet.check_time(wish)
        self.fleet.check_time(wish.model_copy(update={"model_digest": OLD}))
        with pytest.raises(TooLittleTime):
            self.fleet.check_time(wish.model_copy(update={"model_digest": NEW}))

    def test_the_same_card_is_chosen_whoever_announced_last(self) -> None:
        backwards = Fleet([Served([self.slow]), Served([OLDER])])
        assert backwards.cards == self.fleet.cards == [self.slow]

    def test_a_worker_that_tells_no_digest_is_not_taken_for_the_pinned_one(self) -> None:
        mute = Fleet([Served([CARDS[0]])])
        assert mute.digests("tiny-text") == []
        with pytest.raises(NotFound, match="none that is known"):
            mute.choose_for(GenerationRequest.model_validate(WISH))

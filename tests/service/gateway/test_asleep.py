"""Models whose workers an autoscaler has stopped: requests for them are accepted, and wait for a worker."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest

from patchforge.service.gateway import remembered
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.messages.protocol import CAPABILITIES, digest_need
from patchforge.service.messages.schemas import GenerationRequest, JobStatus
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue, keys
from patchforge.service.queue.records import Served
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import CARDS, running
from tests.service.queue.kit import DONE

DIGEST, OTHER = "0" * 64, "1" * 64
TEXT = CARDS[0].model_copy(update={"digest": DIGEST, "least_seconds": 9.0})
WISH = {"model": "tiny-text", "prompt": "apple"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"remember_seconds": 3600})


@pytest.fixture
async def asleep(gateway: Gateway, other_queue: JobQueue) -> None:
    """The only worker has come and gone."""
    other_queue.capabilities |= {digest_need(DIGEST)}
    await other_queue.announce("w", [TEXT])
    await gateway.tick()
    await other_queue.retire("w")


@pytest.mark.usefixtures("asleep")
class TestAModelAsleep:
    async def test_takes_a_job_that_waits_for_a_worker(self, http: httpx.AsyncClient, other_queue: JobQueue) -> None:
        answer = await http.post("/v1/jobs", json=WISH)
        assert answer.status_code == 202
        assert (answer.json()["status"], answer.json()["request"]["steps"]) == ("waiting", TEXT.steps)
        claim = await other_queue.claim("back again", ["tiny-text"], block_seconds=0)
        assert claim is not None
        await other_queue.finish(claim, DONE)
        assert (await other_queue.get(answer.json()["id"])).status is JobStatus.COMPLETED

    async def test_is_ready_and_listed(
        self, http: httpx.AsyncClient, stub: pb_grpc.ImageServiceStub, gateway: Gateway
    ) -> None:
        assert (await http.get("/readyz")).json() == {"status": "ready", "models": ["tiny-text"]}
        [listed] = (await http.get("/v1/models")).json()["data"]
        assert (listed["patchforge"]["asleep"], listed["patchforge"]["digest"]) == (True, DIGEST)
        assert (await http.get("/v2/models/tiny-text/ready")).status_code == 200
        [model] = (await stub.ListModels(pb.ListModelsRequest())).models
        assert model.digest == DIGEST

    async def test_takes_jobs_over_grpc(self, stub: pb_grpc.ImageServiceStub) -> None:
        job = (await stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(**WISH)))).job
        assert job.status == pb.JOB_STATUS_WAITING

    async def test_may_be_pinned(self, http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/jobs", json=WISH | {"model_digest": DIGEST})).status_code == 202
        refused = await http.post("/v1/jobs", json=WISH | {"model_digest": OTHER})
        assert (refused.status_code, refused.json()["field"]) == (404, "model_digest")

    async def test_promises_nothing_about_time_and_refuses_nothing_for_it(self, http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/jobs", json=WISH | {"finish_within_seconds": 1})).status_code == 202

    async def test_is_counted_though_nobody_serves_it(self, http: httpx.AsyncClient) -> None:
        await http.post("/v1/jobs", json=WISH)
        text = (await http.get("/metrics")).text
        seen = dict(re.findall(r'^patchforge_(\w+){model="tiny-text"} (.*)$', text, re.MULTILINE))
        wanted = {"requests_waiting": "1.0", "requests_held": "0.0", "model_workers": "0.0", "model_asleep": "1.0"}
        assert wanted.items() <= seen.items()

    async def test_is_known_to_a_gateway_that_starts_later(self, settings: Settings, queue: JobQueue) -> None:
        async with running(Gateway(settings, queue)) as late:
            assert [card.name for card in (await late.service.ready()).cards] == ["tiny-text"]

    async def test_is_no_other_model(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/jobs", json=WISH | {"model": "other"})
        assert (answer.status_code, answer.json()["field"]) == (404, "model")

    async def test_is_awake_with_its_worker(
        self, http: httpx.AsyncClient, gateway: Gateway, other_queue: JobQueue
    ) -> None:
        newer = TEXT.model_copy(update={"digest": OTHER})
        await other_queue.announce("v", [newer])
        await gateway.tick()
        [listed] = (await http.get("/v1/models")).json()["data"]
        assert (listed["patchforge"]["asleep"], listed["patchforge"]["digests"]) == (False, [OTHER])
        await other_queue.retire("v")
        [listed] = (await http.get("/v1/models")).json()["data"]
        assert listed["patchforge"]["digests"] == [OTHER], "the bundle that was served last"


async def test_a_model_is_known_again_after_the_queue_server_lost_everything(
    gateway: Gateway, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.announce("w", CARDS)
    await gateway.tick()
    await queue._do("DEL", keys.REMEMBERED)
    await gateway.tick()
    assert await queue.remembered() == [], "it is not written at every look"
    monkeypatch.setattr(gateway.service.remembered, "_next", 0.0)
    await gateway.tick()
    assert len(await queue.remembered()) == len(CARDS)
    assert remembered.MOST_SECONDS <= 60


class TestByDefault:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"remember_seconds": Settings().remember_seconds})

    @pytest.fixture
    async def http(self, gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", timeout=PATIENCE) as client:
            yield client

    @pytest.mark.usefixtures("asleep")
    async def test_nobody_waits_for_what_nobody_serves(
        self, http: httpx.AsyncClient, stub: pb_grpc.ImageServiceStub, queue: JobQueue
    ) -> None:
        assert (await http.post("/v1/jobs", json=WISH)).status_code == 503
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/v1/models")).json()["data"] == []
        with pytest.raises(grpc.RpcError) as refused:
            await stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(**WISH)))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await queue.announce("classes only", CARDS[1:])
        assert (await http.post("/v1/jobs", json=WISH)).status_code == 404


class TestFleet:
    def test_a_card_that_cannot_be_read_is_not_replaced_by_an_older_one(self) -> None:
        later = Served(unreadable={"tiny-text": "card.sampler: is of an unknown kind"})
        assert Fleet([later], remembered=[Served([TEXT])]).cards == []

    def test_what_is_remembered_of_a_bundle_is_the_most_able_worker(self) -> None:
        busy = TEXT.model_copy(update={"least_seconds": 20.0})
        fleet = Fleet([Served([TEXT], CAPABILITIES), Served([busy])])
        assert fleet.served_by(fleet.cards[0]).capabilities == CAPABILITIES

    def test_a_job_needs_what_the_remembered_worker_could_do(self) -> None:
        fleet = Fleet([], remembered=[Served([TEXT], CAPABILITIES)])
        fleet.check_capabilities("tiny-text", {"fit"})
        fleet.check_time(GenerationRequest(model="tiny-text", prompt="x", finish_within_seconds=1.0))

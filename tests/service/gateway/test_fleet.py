"""The choice of a model for requests that name none, the same in every API."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import openai
import pytest

from patchforge.service.errors import NotFound, Unavailable, Unsupported
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.gateway.jobs import JobService
from patchforge.service.messages.protocol import FIRST
from patchforge.service.messages.schemas import GenerationRequest, ModelCard
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue, roster
from patchforge.service.queue.records import Served
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import CARDS, ScriptedWorker, running

TEXT, CLASS = CARDS


def text(name: str) -> ModelCard:
    return TEXT.model_copy(update={"name": name})


def classes(name: str, *labels: str) -> ModelCard:
    return CLASS.model_copy(update={"name": name, "classes": [*labels]})


def asked(**fields: Any) -> GenerationRequest:
    return GenerationRequest.model_validate(fields)


def served(*cards: ModelCard, **fields: Any) -> Served:
    return Served(cards, **fields)


class TestFleet:
    fleet = Fleet([served(classes("animals", "cat"), text("paint")), served(classes("fruit", "apple"), text("ink"))])

    def test_a_prompt_is_for_the_first_text_model(self) -> None:
        assert self.fleet.choose_for(asked(prompt="apple")).name == "ink"

    def test_a_class_label_is_for_the_first_class_model_that_has_it(self) -> None:
        assert self.fleet.choose_for(asked(class_label="apple")).name == "fruit"
        assert self.fleet.choose_for(asked(class_label="unicorn")).name == "animals"

    def test_a_name_decides(self) -> None:
        assert self.fleet.choose_for(asked(prompt="apple", model="fruit")).name == "fruit"
        with pytest.raises(NotFound):
            self.fleet.choose_for(asked(prompt="apple", model=""))

    def test_models_of_the_setting_come_first_and_those_not_served_are_passed_over(self) -> None:
        fleet = Fleet([served(*self.fleet.cards)], preferred=["gone", "paint", "fruit"])
        assert [card.name for card in fleet.cards] == ["paint", "fruit", "animals", "ink"]
        assert fleet.choose_for(asked(prompt="apple")).name == "paint"

    def test_without_a_model_of_the_kind_the_error_says_so(self) -> None:
        with pytest.raises(NotFound, match="no worker serves a model that takes a prompt") as caught:
            Fleet([served(classes("animals", "cat"))]).choose_for(asked(prompt="cat"))
        assert caught.value.field == "model"
        with pytest.raises(NotFound, match="no worker serves a model that takes a class label"):
            Fleet([served(text("paint"))]).choose_for(asked(class_label="cat"))
        with pytest.raises(Unavailable):
            Fleet([]).choose_for(asked(prompt="cat"))

    def test_where_a_prompt_may_be_a_class_it_is_one_only_if_there_is_no_text_model(self) -> None:
        animals, fruit = classes("animals", "cat"), classes("fruit", "apple")
        fleet = Fleet([served(animals, fruit)])
        assert fleet.choose_for(asked(prompt="apple"), prompt_may_be_class=True) == fruit
        assert self.fleet.choose_for(asked(prompt="apple"), prompt_may_be_class=True).kind == "text"
        with pytest.raises(NotFound):
            Fleet([served(animals)]).choose_for(asked(prompt="apple"), prompt_may_be_class=True)

    def test_a_model_whose_card_cannot_be_read_is_not_said_to_be_missing(self) -> None:
        later = served(unreadable={"later": "card.sampler: is of an unknown kind"})
        with pytest.raises(Unsupported, match=r"card\.sampler"):
            Fleet([later]).find("later")
        with pytest.raises(Unavailable):
            Fleet([later]).find("other")
        assert Fleet([later, served(text("later"))]).find("later") == text("later")

    def test_what_a_job_needs_one_worker_of_its_model_must_do(self) -> None:
        old, new = served(text("ink")), served(text("ink"), capabilities=FIRST | {"sampler.later"})
        Fleet([old, new]).check_capabilities("ink", {"format.png", "sampler.later"})
        elsewhere = served(text("paint"), capabilities=FIRST | {"sampler.later"})
        with pytest.raises(Unsupported, match=r"no worker that serves ink supports this: sampler\.later"):
            Fleet([old, elsewhere]).check_capabilities("ink", {"format.png", "sampler.later"})


async def test_the_first_request_of_openais_client_names_no_model(url: str, worker: ScriptedWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as client:
        reply = await client.images.generate(prompt="red apple")
        null = await client.images.generate(prompt="red apple", model=None)
    for answer in (reply, null):
        assert answer.model_extra is not None
        job = await worker.queue.get(answer.model_extra["patchforge"]["job_id"])
        assert job.request.model == "tiny-text"


@pytest.mark.parametrize("named", [{}, {"model": None}])
async def test_the_native_api_goes_by_what_is_given(
    http: httpx.AsyncClient, worker: ScriptedWorker, named: dict[str, None]
) -> None:
    for subject, model in (({"prompt": "red apple"}, "tiny-text"), ({"class_label": "cat"}, "tiny-class")):
        answer = await http.post("/v1/jobs", json=subject | named)
        assert answer.json()["request"]["model"] == model


async def test_grpc_takes_an_empty_model_for_none(stub: pb_grpc.ImageServiceStub, worker: ScriptedWorker) -> None:
    for generation in (pb.Generation(prompt="red apple"), pb.Generation(prompt="red apple", model="")):
        job = (await stub.SubmitJob(pb.SubmitJobRequest(generation=generation))).job
        assert job.generation.model == "tiny-text"


async def test_what_is_not_served_is_told_by_every_api(
    url: str, http: httpx.AsyncClient, stub: pb_grpc.ImageServiceStub, queue: JobQueue
) -> None:
    await queue.announce("classes only", [CLASS])
    native = await http.post("/v1/jobs", json={"prompt": "red apple"})
    assert (native.status_code, native.json()["code"], native.json()["field"]) == (404, "not_found", "model")
    foreign = await http.post("/v1/images/generations", json={"prompt": "red apple"})
    assert foreign.status_code == 404
    assert foreign.json()["error"]["param"] == "model"
    with pytest.raises(grpc.RpcError) as refused:
        await stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(prompt="red apple")))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(openai.NotFoundError, match="no worker serves a model that takes a prompt"):
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE
        ) as client:
            await client.images.generate(prompt="red apple")


async def test_the_setting_orders_what_is_listed_and_what_is_chosen(
    settings: Settings, queue: JobQueue, worker: ScriptedWorker
) -> None:
    await queue.announce("another", [text("a-text")])
    preferring = settings.model_copy(update={"default_models": ["tiny-text"]})
    async with (
        running(Gateway(preferring, queue)) as gateway,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", timeout=PATIENCE) as http,
    ):
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["tiny-text", "a-text", "tiny-class"]
        job = (await http.post("/v1/jobs", json={"prompt": "red apple"})).json()
        assert job["request"]["model"] == "tiny-text"


async def test_workers_are_looked_at_again_only_when_something_changed(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "READ_AGAIN", PATIENCE)
    service = JobService(queue)
    await queue.announce("one", CARDS[:1])
    before = await service.fleet()
    assert await service.fleet() is before
    await queue.announce("two", CARDS)
    after = await service.fleet()
    assert [card.name for card in after.cards] == sorted(card.name for card in CARDS)
    assert await service.fleet() is after

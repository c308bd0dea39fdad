"""Budgets over every protocol: the same request reaches the worker, and what cannot be kept is refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest

from patchforge.service.gateway.defaults import fill_defaults
from patchforge.service.gateway.rpc.convert import generation_from_proto, generation_to_proto
from patchforge.service.messages.protocol import needs_of
from patchforge.service.messages.schemas import GenerationRequest, PathChange
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from tests.service.gateway.harness import CARDS, ScriptedWorker

WISH = {"model": "tiny-text", "prompt": "apple", "budget": 999}
Ask = Callable[[httpx.AsyncClient, grpc.aio.Channel], Awaitable[Any]]


async def rest(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    (await http.post("/v1/jobs", json=WISH)).raise_for_status()


async def openai(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    (await http.post("/v1/images/generations", json=WISH)).raise_for_status()


async def inference(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["apple"]}
    budget = {"name": "budget", "datatype": "INT64", "shape": [1], "data": [999]}
    (await http.post("/v2/models/tiny-text/infer", json={"inputs": [prompt, budget]})).raise_for_status()


async def rpc(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    asked = pb.SubmitJobRequest(generation=pb.Generation(**WISH))
    assert (await pb_grpc.ImageServiceStub(channel).SubmitJob(asked)).job.generation.budget == 999


@pytest.mark.parametrize("ask", [rest, openai, inference, rpc])
async def test_it_reaches_the_worker(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, worker: ScriptedWorker, ask: Ask
) -> None:
    asking = asyncio.create_task(ask(http, channel))  # type: ignore[arg-type]
    request = (await worker.queue.get(await worker.next_job())).request
    await asking
    assert request.budget == 999


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"budget": 1}, "budget"),
        ({"budget": 0}, "budget"),
        ({"budget": 999, "budget_share": 0.5}, "budget_share"),
        ({"budget_share": 1.5}, "budget_share"),
        ({"budget": 999, "path": [{"evaluation": 1, "steps": 0}]}, "path"),
        ({"path": [{"evaluation": 1, "steps": 0}], "n": 2}, "path"),
        ({"path": [{"evaluation": 1, "steps": 2}], "sampler": "euler"}, "path"),
        ({"path": [{"evaluation": -1, "steps": 2}]}, "path.0.evaluation"),
    ],
)
async def test_what_cannot_be_kept_is_refused(
    http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, Any], field: str
) -> None:
    reply = await http.post("/v1/jobs", json={"prompt": "cat"} | fields)
    assert reply.status_code == 422
    assert reply.json()["field"] == field


def test_a_share_is_of_what_the_model_usually_takes() -> None:
    card = CARDS[0].model_copy(update={"usual_patch_evaluations": 1000})
    rows, columns = card.grid
    request = GenerationRequest(prompt="x", budget_share=0.5, sampler={"name": "adaptive"})
    filled = fill_defaults(request, card)
    assert (filled.budget, filled.budget_share) == (500, None)
    assert GenerationRequest.model_validate_json(filled.model_dump_json()) == filled
    least = GenerationRequest(prompt="x", budget_share=0.001, sampler={"name": "adaptive"})
    assert fill_defaults(least, card).budget == rows * columns
    uniform = GenerationRequest(prompt="x", budget_share=0.001, sampler={"name": "euler"}, guidance=2.0)
    assert fill_defaults(uniform, card).budget == 2 * rows * columns
    assert fill_defaults(GenerationRequest(prompt="x"), card).budget is None


def test_a_smaller_size_usually_takes_its_share_of_the_patches() -> None:
    card = CARDS[0].model_copy(update={"usual_patch_evaluations": 1000, "sizes": [(16, 16)]})
    request = GenerationRequest(prompt="x", width=16, height=16, budget_share=0.5, sampler={"name": "adaptive"})
    assert card.drawn_grid(request) == (1, 1)
    assert fill_defaults(request, card).budget == round(500 / 6), "one patch of six"
    assert fill_defaults(request.model_copy(update={"budget_share": 1e-9}), card).budget == 1
    assert fill_defaults(request.model_copy(update={"width": 48, "height": 32}), card).budget == 500


def test_only_workers_that_know_budgets_get_such_jobs() -> None:
    assert "budget" in needs_of(GenerationRequest(prompt="x", budget=500))
    assert "budget" in needs_of(GenerationRequest(prompt="x", path=[PathChange(evaluation=1, steps=0)]))
    assert "budget" not in needs_of(GenerationRequest(prompt="x"))
    assert "budget" not in GenerationRequest(prompt="x").model_dump_json()


def test_a_path_survives_grpc() -> None:
    path = [PathChange(evaluation=0, steps=3), PathChange(evaluation=2, steps=0, guided=False)]
    request = GenerationRequest(prompt="x", path=path)
    assert generation_from_proto(generation_to_proto(request)).path == path

"""The Open Inference Protocol over HTTP, as JSON and with binary tensors."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import httpx
import pytest

from service.gateway.inference import OUTPUTS
from service.queue import JobQueue
from tests.service.gateway.harness import ScriptedWorker

INFER = "/v2/models/tiny-text/infer"
LENGTH = "Inference-Header-Content-Length"
APPLE = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["apple"]}
SEED = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [7]}


async def test_health_and_metadata(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    assert (await http.get("/v2/health/live")).json() == {"live": True}
    assert (await http.get("/v2/health/ready")).json() == {"ready": True}
    assert (await http.get("/v2")).json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/tiny-text", "/v2/models/tiny-text/versions/1"):
        assert (await http.get(f"{path}/ready")).json() == {"name": "tiny-text", "ready": True}
        assert [output["name"] for output in (await http.get(path)).json()["outputs"]] == list(OUTPUTS)


async def test_without_a_worker(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v2/health/live")).status_code == 200
    for path in ("/v2/health/ready", "/v2/models/tiny-text/ready", "/v2/models/tiny-text"):
        reply = await http.get(path)
        assert reply.status_code == 503
        assert reply.json().keys() == {"error"}
        assert reply.headers["retry-after"]


async def test_pictures_as_json(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    n = {"name": "n", "datatype": "INT32", "shape": [1], "data": [2]}
    reply = await http.post(INFER, json={"id": "mine", "inputs": [APPLE, SEED, n]})
    assert reply.status_code == 200
    answer = reply.json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "tiny-text", "1")
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert list(outputs) == list(OUTPUTS)
    assert outputs["image"] == {
        "name": "image",
        "datatype": "UINT8",
        "shape": [2, 1, 1, 3],
        "data": [7, 7, 7, 8, 8, 8],
    }
    assert outputs["savings_ratio"]["data"] == [1 / 3]
    assert outputs["seed"]["data"] == [7, 8]


async def test_pictures_as_bytes(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    prompt, seed = struct.pack("<I", 5) + b"apple", struct.pack("<q", 9)
    head = json.dumps(
        {
            "inputs": [
                {"name": "prompt", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(prompt)}},
                {"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": len(seed)}},
            ],
            "outputs": [{"name": "seed"}, {"name": "image", "parameters": {"binary_data": True}}],
        }
    ).encode()
    reply = await http.post(INFER, content=head + prompt + seed, headers={LENGTH: str(len(head))})
    assert reply.status_code == 200
    told = int(reply.headers[LENGTH])
    outputs = json.loads(reply.content[:told])["outputs"]
    assert outputs[0]["data"] == [9]
    assert outputs[1]["parameters"] == {"binary_data_size": 3}
    assert reply.content[told:] == bytes([9, 9, 9])


def without(**change: Any) -> dict[str, Any]:
    return {"inputs": [{name: value for name, value in (APPLE | change).items() if value is not None}]}


BAD: dict[str, tuple[Any, str]] = {
    "no inputs": ({}, "inputs"),
    "nothing in them": ({"inputs": []}, "prompt"),
    "a field unheard of": ({"inputs": [APPLE], "mood": 1}, "mood"),
    "a parameter unheard of": ({"inputs": [APPLE], "parameters": {"priority": 1}}, "parameters.priority"),
    "no data": (without(data=None), "prompt"),
    "a shape of another size": (without(shape=[2]), "prompt"),
    "a negative shape": (without(shape=[-1]), "inputs.0.shape.0"),
    "a huge shape": (without(shape=[10**30]), "inputs.0.shape.0"),
    "another type": (without(datatype="INT32"), "prompt"),
    "no type": (without(datatype="TEXT"), "prompt"),
    "a name of odd letters": (without(name="ü\n", data=None), "\\xfc\\n"),
    "a number": (without(data=[1]), "prompt"),
    "an object": (without(data=[{}]), "prompt"),
    "a surrogate": (without(data=["\ud800"]), "prompt"),
    "bytes that do not come": (without(data=None, parameters={"binary_data_size": 10}), "prompt"),
    "not a number": ({"inputs": [APPLE, SEED | {"data": ["x"]}]}, "seed"),
    "a switch": ({"inputs": [APPLE, SEED | {"data": [True]}]}, "seed"),
    "an output unheard of": ({"inputs": [APPLE], "outputs": [{"name": "mask"}]}, "outputs"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_inputs_are_refused_by_name(http: httpx.AsyncClient, worker: ScriptedWorker, what: str) -> None:
    body, field = BAD[what]
    reply = await http.post(INFER, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"].startswith(f"{field}: ")


@pytest.mark.parametrize("told", ["-1", "9999", "x", "", "1e3", "²"])
async def test_a_wrong_length_of_the_json(http: httpx.AsyncClient, worker: ScriptedWorker, told: str) -> None:
    content = json.dumps({"inputs": [APPLE]})
    headers = {LENGTH: told.encode(), "Content-Type": "application/octet-stream"}
    reply = await http.post(INFER, content=content, headers=headers)
    assert reply.status_code == 400


async def test_bytes_that_belong_to_nothing(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    head = json.dumps({"inputs": [APPLE]}).encode()
    reply = await http.post(INFER, content=head + b"?", headers={LENGTH: str(len(head))})
    assert reply.json()["error"].startswith("inputs: ")


async def test_bodies_of_another_type(http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue) -> None:
    """Not least what a page elsewhere could send without being asked for permission."""
    content = json.dumps({"inputs": [APPLE]})
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ):
        reply = await http.post(INFER, content=content, headers=headers)
        assert reply.status_code == 415, headers
    assert worker.played == 0


async def test_models_that_are_not_there(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for path in ("other", "tiny-text/versions/2"):
        for reply in (
            await http.get(f"/v2/models/{path}"),
            await http.get(f"/v2/models/{path}/ready"),
            await http.post(f"/v2/models/{path}/infer", json={"inputs": [APPLE]}),
        ):
            assert reply.status_code == 404
            assert "no such" in reply.json()["error"]
    assert (await http.get("/v2/nowhere")).json() == {"error": "Not Found"}


async def test_a_job_that_fails(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    reply = await http.post(INFER, json=without(data=["fail"]))
    assert reply.status_code == 500
    assert reply.json() == {"error": "the picture is too big"}


async def test_a_job_cancelled_by_someone_else(
    http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    waiting = asyncio.create_task(http.post(INFER, json={"inputs": [APPLE]}))
    await queue.cancel(await worker.next_job())
    reply = await waiting
    assert reply.status_code == 409
    assert reply.json() == {"error": "the job was cancelled"}

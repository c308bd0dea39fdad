"""The Open Inference Protocol over HTTP, as JSON and with binary tensors."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import httpx
import pytest

from patchforge.service.gateway.inference.protocol import OUTPUTS, Result, describe_outputs, make_outputs
from patchforge.service.messages.schemas import ImageReport
from patchforge.service.queue import JobQueue
from tests.service.gateway.harness import CARDS, COLUMNS, ROWS, ScriptedWorker, report
from tests.service.gateway.pictures import base64, decoded, encoded, gradient

INFER = "/v2/models/tiny-text/infer"
LENGTH = "Inference-Header-Content-Length"
APPLE = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["apple"]}
SEED = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [7]}


async def test_health_and_metadata(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    assert (await http.get("/v2/health/live")).json() == {"live": True}
    assert (await http.get("/v2/health/ready")).json() == {"ready": True}
    assert (await http.get("/v2")).json()["extensions"] == ["binary_tensor_data", "model_configuration", "statistics"]
    for path in ("/v2/models/tiny-text", "/v2/models/tiny-text/versions/1"):
        assert (await http.get(f"{path}/ready")).json() == {"name": "tiny-text", "ready": True}
        assert [output["name"] for output in (await http.get(path)).json()["outputs"]] == list(OUTPUTS)


def test_values_per_patch_have_the_shape_of_the_picture_that_was_drawn() -> None:
    [text, _] = CARDS
    shapes = {each.name: each.shape for each in describe_outputs(text)}
    assert shapes["finished_at"] == (-1, ROWS, COLUMNS)
    several = text.model_copy(update={"sizes": [(16, 32)]})
    shapes = {each.name: each.shape for each in describe_outputs(several)}
    assert shapes["finished_at"] == shapes["difficulty"] == (-1, -1, -1)
    image = ImageReport(seed=1, patch_evaluations=2, dense_patch_evaluations=2, difficulty=[0.5, 1], finished_at=[1, 1])
    drawn = report(1, 1).model_copy(update={"grid_rows": 2, "grid_columns": 1, "images": [image]})
    assert make_outputs(Result([], drawn), ["finished_at"])[0].shape == (1, 2, 1)


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
    "a parameter out of range": ({"inputs": [APPLE], "parameters": {"n": 11}}, "n"),
    "an input and a parameter": ({"inputs": [APPLE, SEED], "parameters": {"seed": 1}}, "seed"),
    "half a sampler in a parameter": ({"inputs": [APPLE], "parameters": {"sampler": {}}}, "sampler"),
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
    """These include the types that a page of another origin may send without a preflight request."""
    content = json.dumps({"inputs": [APPLE]})
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json", "Content-Encoding": "br"},
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


PECULIAR: dict[str, dict[str, Any]] = {
    "KServe": {
        "id": None,
        "model_name": "tiny-text",
        "model_version": None,
        "parameters": None,
        "inputs": [APPLE | {"parameters": {"binary_data_size": None}}],
    },
    "MLServer": {
        "id": None,
        "parameters": {"content_type": "str", "headers": {"x": "y"}},
        "inputs": [APPLE | {"shape": [1, 1], "parameters": {"content_type": "str", "headers": None}}],
        "outputs": [],
    },
    "Triton": {
        "id": "",
        "parameters": {"priority": 1, "timeout": 5_000_000, "sequence_id": 0, "binary_data_output": False},
        "inputs": [APPLE],
        "outputs": [{"name": "seed", "parameters": {"classification": 0, "binary_data": False}}],
    },
}


@pytest.mark.parametrize("peer", PECULIAR)
async def test_what_peers_send_beside_what_is_known_is_passed_over(
    http: httpx.AsyncClient, worker: ScriptedWorker, peer: str
) -> None:
    reply = await http.post(INFER, json=PECULIAR[peer])
    assert reply.status_code == 200, reply.text
    assert "id" not in reply.json()


async def test_parameters_named_like_inputs_are_inputs(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    sampler = '{"name": "dual_loop", "quantile": 0.25}'
    parameters = {"n": 2.0, "seed": 7, "guidance": 2, "sampler": sampler, "steps": None}
    call = asyncio.create_task(http.post(INFER, json={"inputs": [APPLE], "parameters": parameters}))
    request = (await worker.queue.get(await worker.next_job())).request
    assert (await call).status_code == 200
    assert (request.n, request.seed, request.guidance) == (2, 7, 2)
    assert request.sampler is not None
    assert request.sampler.model_dump()["quantile"] == 0.25


async def test_pictures_as_text_in_json(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """JSON cannot hold a file: it comes in base64, as MLServer sends it, or as a data URL."""
    text = base64(encoded(gradient()))
    for sent in (text, f"data:image/png;base64,{text}"):
        picture = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [sent]}
        call = asyncio.create_task(http.post(INFER, json={"inputs": [APPLE, picture]}))
        source = await worker.queue.source(await worker.next_job())
        assert decoded(source.image).tobytes() == gradient().tobytes()
        assert (await call).status_code == 200
    picture["data"] = ["no picture"]
    assert (await http.post(INFER, json={"inputs": [APPLE, picture]})).json()["error"].startswith("image: ")


async def test_integers_sent_as_floats(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body = {"inputs": [APPLE, {"name": "n", "datatype": "FP32", "parameters": {"binary_data_size": 4}, "shape": [1]}]}
    head = json.dumps(body).encode()
    for number, status in ((2.0, 200), (2.5, 400)):
        sent = head + struct.pack("<f", number)
        reply = await http.post(INFER, content=sent, headers={LENGTH: str(len(head))})
        assert reply.status_code == status


async def test_configuration_and_index(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for path in ("/v2/models/tiny-text/config", "/v2/models/tiny-text/versions/1/config"):
        told = (await http.get(path)).json()
        inputs = {each["name"]: (each["data_type"], each["dims"], each["optional"]) for each in told["input"]}
        assert (told["name"], told["max_batch_size"]) == ("tiny-text", 0)
        assert inputs["prompt"] == ("TYPE_STRING", [1], False)
        assert inputs["n"] == ("TYPE_INT32", [1], True)
        assert [each["name"] for each in told["output"]] == list(OUTPUTS)
    index = (await http.post("/v2/repository/index", json={})).json()
    assert [(each["name"], each["state"]) for each in index] == [("tiny-class", "READY"), ("tiny-text", "READY")]
    for path in ("/v2/models/other/config", "/v2/models/other/stats", "/v2/models/tiny-text/versions/2/stats"):
        assert (await http.get(path)).status_code == 404


async def test_statistics_count_what_this_gateway_inferred(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for data in (["apple"], ["apple"], ["fail"]):
        await http.post(INFER, json={"inputs": [APPLE | {"data": data}], "parameters": {"n": 2}})
    [told] = (await http.get("/v2/models/tiny-text/stats")).json()["model_stats"]
    assert (told["inference_count"], told["execution_count"]) == (4, 2)
    spent = told["inference_stats"]
    assert (spent["success"]["count"], spent["fail"]["count"], spent["queue"]["count"]) == (2, 1, 2)
    assert spent["success"]["ns"] == pytest.approx(spent["queue"]["ns"] + spent["compute_infer"]["ns"], abs=2e8)
    assert told["last_inference"] > 1_700_000_000_000
    everything = (await http.get("/v2/models/stats")).json()["model_stats"]
    assert [(each["name"], each["execution_count"]) for each in everything] == [("tiny-class", 0), ("tiny-text", 2)]

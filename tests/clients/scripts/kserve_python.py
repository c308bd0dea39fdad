"""KServe's clients: python kserve_python.py HTTP_URL GRPC_ADDRESS."""

import asyncio
import sys
from base64 import b64encode

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from report import check, packages, png

URL, ADDRESS = sys.argv[1:]
packages("kserve")


def wish(binary: bool, **more: object) -> InferRequest:
    """A request as its documentation writes one."""
    label, seed = InferInput("class_label", [1], "BYTES"), InferInput("seed", [1], "INT64")
    label.set_data_from_numpy(np.array([b"food-fruit"], dtype=object), binary_data=binary)
    seed.set_data_from_numpy(np.array([7], dtype=np.int64), binary_data=binary)
    return InferRequest(model_name="emoji-class", infer_inputs=[label, seed], **more)


def outputs(answer: object) -> dict[str, np.ndarray]:
    return {output.name: output.as_numpy() for output in answer.outputs}


async def over_rest(request: InferRequest) -> dict[str, np.ndarray]:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=120))
    return outputs(await client.infer(URL, request, model_name="emoji-class"))


async def over_grpc(request: InferRequest) -> dict[str, np.ndarray]:
    async with InferenceGRPCClient(ADDRESS, timeout=120) as client:
        return outputs(await client.infer(request))


@check("REST: server and model are ready")
def _() -> None:
    async def ask() -> None:
        client = InferenceRESTClient(RESTConfig(protocol="v2"))
        assert await client.is_server_live(URL)
        assert await client.is_server_ready(URL)
        assert await client.is_model_ready(URL, "emoji-class")

    asyncio.run(ask())


@check("REST: infer, JSON")
def _() -> None:
    made = asyncio.run(over_rest(wish(binary=False)))
    assert made["image"].shape[0] == 1
    assert made["seed"].tolist() == [7]


@check("REST: infer, binary, with outputs and parameters")
def _() -> None:
    wanted = [RequestedOutput("image", {"binary_data": True}), RequestedOutput("seed")]
    made = asyncio.run(over_rest(wish(binary=True, request_outputs=wanted, parameters={"content_type": "np", "n": 2})))
    assert made["image"].shape[0] == 2
    assert made["seed"].tolist() == [7, 8]


@check("gRPC: server and model are ready")
def _() -> None:
    async def ask() -> None:
        async with InferenceGRPCClient(ADDRESS) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("emoji-class")

    asyncio.run(ask())


@check("gRPC: infer, raw and not")
def _() -> None:
    one, other = (asyncio.run(over_grpc(wish(binary=binary))) for binary in (True, False))
    assert one["seed"].tolist() == other["seed"].tolist() == [7]
    assert np.abs(one["image"].astype(int) - other["image"].astype(int)).max() <= 1


@check("REST: MLServer's habits: null id, content types, base64 pictures")
def _() -> None:
    async def ask() -> dict:
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=120))
        picture = b64encode(png(64, 64)).decode()
        kinds = {"prompt": ("green apple", "str"), "image": (picture, "base64")}
        inputs = [
            {"name": name, "shape": [1, 1], "datatype": "BYTES", "parameters": {"content_type": kind}, "data": [value]}
            for name, (value, kind) in kinds.items()
        ]
        body = {"id": None, "parameters": {"content_type": None, "headers": {}}, "inputs": inputs, "outputs": []}
        return outputs(await client.infer(URL, body, model_name="emoji-text"))

    assert asyncio.run(ask())["image"].shape == (1, 64, 64, 3)

"""Row 28: no caller can add metric series."""

from __future__ import annotations

import json
import random
import string

import grpc
import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.faults.gateway_kit import APPLE, Stage, raw
from tests.faults.gateways import Gateway

BATCH = 200


def test_row_28_random_names(stage: Stage) -> None:
    strangers_leave_no_trace(stage.gateway, 1000)


@pytest.mark.slow
def test_row_28_ten_thousand_random_names(stage: Stage) -> None:
    strangers_leave_no_trace(stage.gateway, 10_000)


def strangers_leave_no_trace(gateway: Gateway, count: int) -> None:
    """Many random models, paths and methods, over REST and gRPC, add no series."""
    chance = random.Random(28)
    gateway.ended(gateway.submit(APPLE))
    names_of_series(gateway)  # scrapes are counted too
    ask_for_odd_things(gateway, chance, BATCH)
    series = names_of_series(gateway)
    ask_for_odd_things(gateway, chance, count)
    assert names_of_series(gateway) == series
    assert not [name for name in series if "random" in name]


def ask_for_odd_things(gateway: Gateway, chance: random.Random, count: int) -> None:
    for _ in range(0, count, BATCH):
        with raw(gateway) as connection:
            connection.sendall(b"".join(odd_request(chance) for _ in range(BATCH)) + b"GET /healthz HTTP/1.1\r\n")
            connection.sendall(b"Host: x\r\nConnection: close\r\n\r\n")
            answers = b""
            while chunk := connection.recv(1 << 20):
                answers += chunk
            assert answers.count(b"HTTP/1.1 ") == BATCH + 1
    with grpc.insecure_channel(gateway.grpc_address) as channel:
        for _ in range(count // 20):
            name = random_name(chance)
            wanted = pb.SubmitJobRequest(generation=pb.Generation(prompt="x", model=name)).SerializeToString()
            unknown = (
                f"/patchforge.v1.ImageService/{name}",
                f"/inference.GRPCInferenceService/{name}",
                f"/{name}/{name}",
            )
            for method in (*unknown, *KNOWN_METHODS):
                with pytest.raises(grpc.RpcError):
                    channel.unary_unary(method)(wanted)


SERVICES = ("patchforge.v1.ImageService", "inference.GRPCInferenceService")
KNOWN_METHODS = (
    "/patchforge.v1.ImageService/SubmitJob",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelMetadata",
)


def infer(name: str) -> bytes:
    """A body of the Open Inference Protocol with an input of this name."""
    return json.dumps({"inputs": [{"name": name, "datatype": "BYTES", "shape": [1], "data": ["x"]}]}).encode()


def odd_request(chance: random.Random) -> bytes:
    """A place where a stranger may put a name."""
    name = random_name(chance)
    method, path, body = chance.choice(
        [
            ("GET", f"/{name}", b""),
            ("GET", f"/v1/{name}/{name}", b""),
            ("GET", f"/v1/models/{name}", b""),
            ("GET", f"/v1/jobs/{name}", b""),
            ("DELETE", f"/v1/jobs/{name}", b""),
            ("GET", f"/v1/jobs/{name}/events", b""),
            ("GET", f"/v1/jobs/{name}/image?index={name}", b""),
            ("GET", f"/playground/{name}", b""),
            (name.upper(), "/v1/jobs", b""),
            (name, f"/{name}", b""),
            ("POST", "/v1/jobs", json.dumps({"prompt": "x", "model": name}).encode()),
            ("POST", "/v1/jobs", json.dumps({"prompt": "x", "model": "tiny-text", "sampler": name}).encode()),
            ("POST", "/v1/images/generations", json.dumps({"prompt": "x", "model": name}).encode()),
            ("POST", "/v1/images/edits", name.encode()),
            ("GET", f"/v1/jobs/{name}/maps/{name}.png", b""),
            ("GET", f"/v2/{name}", b""),
            ("GET", f"/v2/models/{name}/versions/{name}/ready", b""),
            ("POST", f"/v2/models/{name}/infer", infer(name)),
            ("POST", f"/v2/models/tiny-text/versions/{name}/infer", infer("prompt")),
            ("POST", "/v2/models/tiny-text/infer", infer(name)),
        ]
    )
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def random_name(chance: random.Random) -> str:
    return "random-" + "".join(chance.choices(string.ascii_letters, k=chance.randint(1, 20)))


def names_of_series(gateway: Gateway) -> list[str]:
    """Returns all series with their labels, without values."""
    lines = gateway.http.get("/metrics").text.splitlines()
    return sorted(line.rpartition(" ")[0] for line in lines if not line.startswith("#"))

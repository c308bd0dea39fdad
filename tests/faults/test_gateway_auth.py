"""Row 27: without a key nobody gets in, and with a key nobody reaches another caller's jobs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from patchforge.service.gateway.auth import make_entry, new_key
from patchforge.service.pb.inference import grpc_inference_service_pb2 as oip
from patchforge.service.pb.inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceStub
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from tests.faults.gateway_kit import (
    APPLE,
    JSON,
    NO_JOB,
    Stage,
    answer_to,
    flat_memory,
    openai_client,
    refusals,
    status_of,
)
from tests.faults.gateways import Gateway
from tests.patience import PATIENCE

GENERATION = pb.Generation(prompt="a red apple", model="tiny-text", seed=7)
OPEN = (
    *("/", "/healthz", "/readyz", "/metrics", "/playground/app.js", "/playground/style.css"),
    *("/v2/health/live", "/v2/health/ready"),
)
CLOSED = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny-text"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/jobs"),
    ("POST", "/v1/images/edits"),
    ("POST", "/v2/models/tiny-text/infer"),
    ("POST", "/v2/models/tiny-text/versions/1/infer"),
    ("GET", f"/v1/jobs/{NO_JOB}"),
    ("DELETE", f"/v1/jobs/{NO_JOB}"),
    ("GET", f"/v1/jobs/{NO_JOB}/events"),
    ("GET", f"/v1/jobs/{NO_JOB}/image"),
    ("GET", f"/v1/jobs/{NO_JOB}/maps/finish.png"),
    ("GET", f"/v1/jobs/{NO_JOB}/maps/difficulty.png"),
    ("GET", "/v2"),
    ("GET", "/v2/models/tiny-text"),
    ("GET", "/v2/models/tiny-text/ready"),
    ("GET", "/v2/models/tiny-text/versions/1"),
    ("GET", "/v2/models/tiny-text/versions/1/ready"),
    ("GET", "/v2/models/tiny-text/stats"),
    ("GET", "/v2/models/tiny-text/versions/1/stats"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/tiny-text/config"),
    ("GET", "/v2/models/tiny-text/versions/1/config"),
    ("POST", "/v2/repository/index"),
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/file-1"),
    ("DELETE", "/v1/files/file-1"),
    ("GET", "/v1/files/file-1/content"),
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/batch-1"),
    ("DELETE", "/v1/batches/batch-1"),
    ("POST", "/v1/batches/batch-1/cancel"),
    ("GET", "/v2/health"),
    ("GET", "/v2/health/live/"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("BREW", "/v1/jobs"),
    ("GET", "/healthz/"),
    ("GET", "/playground"),
]
UPLOADS = ("/v1/jobs", "/v1/images/edits", "/v2/models/tiny-text/infer", "/v1/files", "/v1/batches")
TWISTED = ["//healthz", "/playground/../v1/models", "/playground%2f..%2fv1%2fmodels", "/healthz%00", "/%68ealthz/../v1"]


@dataclass(frozen=True)
class Locked:
    """A gateway that requires keys: two of Alice's, so that she can change them, and one of Bob's."""

    gateway: Gateway
    alice: str
    alices_new: str
    bob: str

    def http(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.gateway.url, headers={"x-api-key": key}, timeout=PATIENCE)


@pytest.fixture(scope="module")
def locked(stage: Stage) -> Iterator[Locked]:
    keys = [new_key() for _ in range(3)]
    entries = [make_entry(name, key) for name, key in zip(("alice", "alice", "bob"), keys, strict=True)]
    with stage.another_gateway(api_keys=entries, log_level="DEBUG") as gateway:
        yield Locked(gateway, *keys)


def bad_credentials(locked: Locked) -> list[dict[str, str]]:
    headers = [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {new_key()}",
        f"Bearer {locked.alice}x",
        f"Bearer {locked.alice[:-1]}",
        f"Bearer {make_entry('alice', locked.alice)}",
        f"Bearer {make_entry('alice', locked.alice).partition(':')[2]}",
        f"Basic {locked.alice}",
        locked.alice,
        "Bearer alice",
        "Bearer " + "x" * 4000,
    ]
    return [{}, {"x-api-key": "wrong"}, *({"authorization": header} for header in headers)]


def test_row_27_no_way_in_over_rest(locked: Locked) -> None:
    """Every path except the open ones, streams included, with any request."""
    http, refused = locked.gateway.http, refusals(locked.gateway)
    for headers in bad_credentials(locked):
        for method, path in CLOSED if len(headers) == 0 else CLOSED[2:10]:
            answer = http.request(method, path, headers=headers | JSON, content=b'{"prompt": "x", "stream": true}')
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="patchforge"'
            if path.startswith(("/v1/images", "/v1/models", "/v1/files", "/v1/batches")):
                assert set(answer.json()) == {"error"}
                assert answer.json()["error"]["code"] == "unauthenticated"
            elif path.startswith("/v2/"):
                assert "API key" in answer.json()["error"]
            else:
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["code"] == "unauthenticated"
            assert "x" * 100 not in answer.text
    assert http.get("/v1/models", headers=[(b"authorization", b"Bearer \xff\xfe\xc3\xa9")]).status_code == 401
    assert http.head("/v1/models").status_code == 401
    for path in TWISTED:
        answer = answer_to(locked.gateway, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert status_of(answer) in (401, 404), path
    for path in OPEN:
        assert http.get(path).status_code == 200, path
    assert refusals(locked.gateway) >= refused + len(CLOSED) + len(TWISTED)  # what an operator sees


def test_row_27_every_path_there_is_was_tried(locked: Locked) -> None:
    """Uses the gateway's own list, so that new endpoints are not forgotten."""
    with locked.http(locked.alice) as alice:
        known = alice.get("/openapi.json").json()["paths"]
    places = {"{job_id}": NO_JOB, "{name}": "tiny-text", "{version}": "1", "{kind}": "finish"}
    places |= {"{file_id}": "file-1", "{batch_id}": "batch-1"}
    for template, operations in known.items():
        path = template
        for place, value in places.items():
            path = path.replace(place, value)
        for method in operations:
            assert (method.upper(), path) in CLOSED or path in OPEN, (method, template)


@pytest.mark.parametrize("path", UPLOADS)
def test_row_27_a_body_without_a_key_is_not_taken(locked: Locked, path: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if path.endswith(("edits", "files")) else JSON
    with flat_memory(locked.gateway, 16):
        answer = locked.gateway.http.post(path, content=b" " * (60 << 20), headers=headers)
    assert answer.status_code in (401, 413), "which of the two limits is first does not matter"


def test_row_27_no_way_in_over_grpc(locked: Locked) -> None:
    """Calls, streams and reflection need a key. Health is open, like the probes."""
    with grpc.insecure_channel(locked.gateway.grpc_address) as channel:
        inference = GRPCInferenceServiceStub(channel)
        images, reflection = ImageServiceStub(channel), reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        refused = 0
        for headers in bad_credentials(locked):
            metadata = list(headers.items())
            calls = [
                lambda m: images.SubmitJob(pb.SubmitJobRequest(generation=GENERATION), metadata=m),
                lambda m: list(images.GenerateImage(pb.GenerateImageRequest(generation=GENERATION), metadata=m)),
                lambda m: images.GetJob(pb.GetJobRequest(job_id=NO_JOB), metadata=m),
                lambda m: list(images.WatchJob(pb.WatchJobRequest(job_id=NO_JOB), metadata=m)),
                lambda m: images.CancelJob(pb.CancelJobRequest(job_id=NO_JOB), metadata=m),
                lambda m: images.GetImage(pb.GetImageRequest(job_id=NO_JOB), metadata=m),
                lambda m: images.ListModels(pb.ListModelsRequest(), metadata=m),
                lambda m: inference.ModelInfer(oip.ModelInferRequest(model_name="tiny-text"), metadata=m),
                lambda m: inference.ModelMetadata(oip.ModelMetadataRequest(name="tiny-text"), metadata=m),
                lambda m: inference.ModelReady(oip.ModelReadyRequest(name="tiny-text"), metadata=m),
                lambda m: inference.ServerMetadata(oip.ServerMetadataRequest(), metadata=m),
                lambda m: list(reflection.ServerReflectionInfo(iter([question]), metadata=m)),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call(metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert dict(caught.value.trailing_metadata())["error-code"] == "unauthenticated"
            refused += len(calls) - 1
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert inference.ServerLive(oip.ServerLiveRequest()).live
        assert inference.ServerReady(oip.ServerReadyRequest()).ready
        metadata = [("authorization", f"Bearer {locked.alice}")]
        assert inference.ModelReady(oip.ModelReadyRequest(name="tiny-text"), metadata=metadata).ready
        assert list(reflection.ServerReflectionInfo(iter([question]), metadata=metadata))
    locked.gateway.await_metric(refused, "patchforge_grpc_requests_total", status="UNAUTHENTICATED")


def test_row_27_a_key_opens_every_door(locked: Locked, stage: Stage) -> None:
    with openai_client(locked.gateway, locked.alice) as client:
        assert client.images.generate(prompt="apple", model="tiny-text").data
        assert list(client.images.generate(prompt="apple", model="tiny-text", stream=True))
        assert client.models.retrieve("tiny-text").id == "tiny-text"
    with openai_client(locked.gateway, "unused") as client, pytest.raises(openai.AuthenticationError):
        client.images.generate(prompt="apple", model="tiny-text")
    for headers in ({"Authorization": f"bearer  {locked.bob}"}, {"X-API-KEY": locked.bob}):
        assert locked.gateway.http.get("/v1/models", headers=headers).status_code == 200
    assert locked.gateway.http.get("/docs", headers={"x-api-key": locked.bob}).status_code == 200
    with locked.gateway.grpc() as stub:
        for metadata in ([("authorization", f"Bearer {locked.bob}")], [("x-api-key", locked.bob)]):
            replies = list(stub.GenerateImage(pb.GenerateImageRequest(generation=GENERATION), metadata=metadata))
            assert replies[-1].event.WhichOneof("event") == "completed"


ANOTHERS = [
    *(("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/image")),
    *(("GET", "/maps/finish.png"), ("GET", "/maps/difficulty.png")),
]
SAME_NAME = {"X-Request-Id": "same"}  # or each answer would have another


def test_row_27_anothers_job_is_not_there(locked: Locked, stage: Stage) -> None:
    """Another caller's job cannot be seen, followed, fetched or cancelled, exactly as if it did not exist."""
    with locked.http(locked.alice) as alice, locked.http(locked.bob) as bob, stage.curtain_down():
        job = alice.post("/v1/jobs", json=APPLE).json()["id"]
        strangers = [bob, stage.gateway.http]  # a gateway without keys must not find the job either
        for stranger in strangers:
            for method, path in ANOTHERS:
                answer = stranger.request(method, f"/v1/jobs/{job}{path}", headers=SAME_NAME)
                assert answer.status_code == 404, (method, path)
                unknown = stranger.request(method, f"/v1/jobs/{NO_JOB}{path}", headers=SAME_NAME)
                assert answer.text.replace(job, NO_JOB) == unknown.text
        with locked.gateway.grpc() as stub:
            calls: list[Any] = [
                lambda m: stub.GetJob(pb.GetJobRequest(job_id=job), metadata=m),
                lambda m: stub.CancelJob(pb.CancelJobRequest(job_id=job), metadata=m),
                lambda m: stub.GetImage(pb.GetImageRequest(job_id=job), metadata=m),
                lambda m: list(stub.WatchJob(pb.WatchJobRequest(job_id=job), metadata=m)),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    call([("x-api-key", locked.bob)])
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert calls[0]([("x-api-key", locked.alice)]).job.id == job
        with locked.http(locked.alices_new) as same_alice:
            seen = same_alice.get(f"/v1/jobs/{job}")
            assert seen.status_code == 200, "not even the stranger's cancel came through"
            assert seen.json()["status"] in ("waiting", "running")
            assert "tenant" not in seen.json()
            assert same_alice.delete(f"/v1/jobs/{job}").status_code == 200


def test_row_27_idempotency_keys_are_each_tenants_own(locked: Locked, stage: Stage) -> None:
    with locked.http(locked.alice) as alice, locked.http(locked.alices_new) as new, locked.http(locked.bob) as bob:
        ids = [
            caller.post("/v1/jobs", json=APPLE, headers={"Idempotency-Key": "the same"}).json()["id"]
            for caller in (alice, new, bob, stage.gateway.http)
        ]
        assert ids[0] == ids[1]
        assert len(set(ids)) == 3
        other = bob.post("/v1/jobs", json=APPLE | {"n": 2}, headers={"Idempotency-Key": "the same"})
        assert other.json()["code"] == "idempotency_conflict"
        for job, owner in zip(ids[1:], (new, bob, stage.gateway.http), strict=True):
            owner.delete(f"/v1/jobs/{job}")


def test_row_27_no_secret_is_logged(locked: Locked, stage: Stage) -> None:
    """After all the tests above, neither a key nor its hash is stored."""
    locked.gateway.http.get("/v1/jobs/x?api_key=wrong", headers={"Authorization": f"Bearer {locked.alice}"})
    written = locked.gateway.transcript()
    with stage.redis as redis:
        kept = b" ".join(value for key in redis.keys("*job:*") for value in redis.hvals(key)).decode()
    for key in (locked.alice, locked.alices_new, locked.bob):
        for secret in (key, make_entry("", key)[1:]):
            assert secret not in written
            assert secret not in kept
    assert "alice" in kept

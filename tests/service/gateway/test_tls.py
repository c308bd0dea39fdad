"""HTTPS and gRPC over TLS, with a certificate made by the tests."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.tls import load_certificate
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.processes import run
from tests.service.gateway.harness import ScriptedWorker, running


def self_signed(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """Certificate and key for 127.0.0.1."""
    chain, key = folder / f"{name}.crt", folder / f"{name}.key"
    subject = ("-subj", "/CN=patchforge.test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    command = ["openssl", "req", "-x509", "-days", "1", *curve, *subject, "-keyout", str(key), "-out", str(chain)]
    run(*command)
    return chain, key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def settings(settings: Settings, files: tuple[Path, Path]) -> Settings:
    return settings.model_copy(update={"tls_cert": files[0], "tls_key": files[1]})


@pytest.fixture
async def gateway(settings: Settings, queue: JobQueue, worker: ScriptedWorker) -> AsyncIterator[Gateway]:
    async with running(Gateway(settings, queue)) as started:
        yield started


async def test_https(gateway: Gateway, files: tuple[Path, Path]) -> None:
    trusting = ssl.create_default_context(cafile=str(files[0]))
    async with httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{gateway.http_port}", verify=trusting, timeout=PATIENCE
    ) as http:
        accepted = await http.post("/v1/jobs", json={"class_label": "cat"})
        assert accepted.status_code == 202
        async with http.stream("GET", f"/v1/jobs/{accepted.json()['id']}/events") as stream:
            lines = [line async for line in stream.aiter_lines()]
    assert "event: completed" in lines


async def test_https_shows_the_certificate_and_nothing_older_than_tls_1_2(
    gateway: Gateway, files: tuple[Path, Path]
) -> None:
    async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{gateway.http_port}", timeout=PATIENCE) as stranger:
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await stranger.get("/healthz")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", timeout=PATIENCE) as plain:
        with pytest.raises(httpx.TransportError):
            await plain.get("/healthz")
    context = gateway.http.config.ssl
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


async def test_grpc_over_tls(gateway: Gateway, files: tuple[Path, Path]) -> None:
    trusting = grpc.ssl_channel_credentials(files[0].read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{gateway.grpc_port}", trusting) as channel:
        await gateway.tick()
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = pb_grpc.ImageServiceStub(channel)
        request = pb.GenerateImageRequest(generation=pb.Generation(class_label="cat"))
        kinds = [reply.event.WhichOneof("event") async for reply in stub.GenerateImage(request, timeout=PATIENCE)]
    assert kinds[-1] == "completed"


async def test_grpc_does_not_speak_plainly(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class TestFiles:
    def test_none(self) -> None:
        assert load_certificate(Settings()) is None

    def test_one_without_the_other(self, files: tuple[Path, Path]) -> None:
        for half in ({"tls_cert": files[0]}, {"tls_key": files[1]}):
            with pytest.raises(InvalidRequest, match="both or neither"):
                load_certificate(Settings(**half))

    def test_missing_damaged_and_mismatched(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        other_chain, _ = self_signed(tmp_path, "other")
        empty = tmp_path / "empty"
        empty.write_text("")
        for chain, key in (
            (tmp_path / "none", files[1]),
            (empty, files[1]),
            (files[0], empty),
            (other_chain, files[1]),
        ):
            with pytest.raises(InvalidRequest, match="cannot use certificate"):
                load_certificate(Settings(tls_cert=chain, tls_key=key))

    def test_a_key_with_a_password_is_refused_and_not_asked_for(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        locked = tmp_path / "locked.key"
        command = ["openssl", "ec", "-in", str(files[1]), "-aes256", "-passout", "pass:open", "-out", str(locked)]
        run(*command)
        with pytest.raises(InvalidRequest, match="cannot use certificate"):
            load_certificate(Settings(tls_cert=files[0], tls_key=locked))

    def test_the_key_is_not_shown(self, files: tuple[Path, Path]) -> None:
        shown = load_certificate(Settings(tls_cert=files[0], tls_key=files[1]))
        assert str(files[1]) not in repr(shown)

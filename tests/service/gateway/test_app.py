"""A gateway's life: readiness, metrics, draining, and a light process."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.processes import PYTHON, Process
from tests.service.gateway.harness import CARDS, ScriptedWorker, ended, running

APPLE = {"prompt": "a red apple", "model": "tiny-text"}


async def test_ready_once_a_worker_serves_a_model(http: httpx.AsyncClient, queue: JobQueue) -> None:
    assert (await http.get("/healthz")).status_code == 200
    unready = await http.get("/readyz")
    assert unready.status_code == 503
    assert unready.json()["detail"] == "no worker is serving a model"
    assert unready.headers["retry-after"]
    await queue.announce("scripted", CARDS)
    assert (await http.get("/readyz")).json() == {"status": "ready", "models": ["tiny-class", "tiny-text"]}


async def test_small_answers_do_not_wait_for_delayed_acknowledgements(
    http: httpx.AsyncClient, gateway: Gateway
) -> None:
    await http.get("/healthz")
    [connection] = gateway.http.server_state.connections
    ours = connection.transport.get_extra_info("socket")
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_gateway_waits_for_its_queue_server(settings: Settings, tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    with server:
        url = server.url
    queue = JobQueue.connect(url, settings)
    async with (
        running(Gateway(settings, queue)) as gateway,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", timeout=PATIENCE) as http,
    ):
        assert (await http.get("/healthz")).status_code == 200
        for reply in (await http.get("/readyz"), await http.post("/v1/jobs", json=APPLE)):
            assert reply.status_code == 503
            assert reply.json()["detail"] == "the queue server cannot be reached"
        assert (await http.get("/metrics")).status_code == 200
        with server:
            await queue.announce("scripted", CARDS)
            assert (await http.get("/readyz")).status_code == 200
    await queue.close()


async def test_metrics_join_the_gateways_and_the_workers(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    own = b"# HELP patchforge_patch_evaluations_total .\n# TYPE patchforge_patch_evaluations_total counter\n"
    await worker.queue.announce_metrics("scripted", own + b"patchforge_patch_evaluations_total 32.0\n")
    worker.curtain.clear()
    for path in ("/v1/jobs/x", "/v1/jobs/y", "/no/such", "/playground/app.js"):
        await http.get(path)
    await http.post("/v1/jobs", json=APPLE)
    reply = await http.get("/metrics", params={"workers": "true"})
    assert reply.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    assert samples["patchforge_patch_evaluations_total",] == 32
    assert samples["patchforge_http_requests_total", "/v1/jobs/{job_id}", "4xx", "GET"] == 2
    assert samples["patchforge_http_requests_total", "/v1/jobs", "2xx", "POST"] == 1
    assert not [key for key in samples if "/no/such" in key or "/v1/jobs/x" in key]


async def test_draining_ends_watches_and_lets_runs_finish(
    settings: Settings, queue: JobQueue, worker: ScriptedWorker
) -> None:
    patient = settings.model_copy(update={"drain_seconds": 60})
    worker.curtain.clear()
    async with running(Gateway(patient, queue)) as gateway:
        url = f"http://127.0.0.1:{gateway.http_port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel,
        ):
            call = asyncio.create_task(http.post("/v1/images/generations", json=APPLE))
            job_id = await worker.next_job()
            rpc_watch = pb_grpc.ImageServiceStub(channel).WatchJob(pb.WatchJobRequest(job_id=job_id))
            await rpc_watch.read()
            async with http.stream("GET", f"/v1/jobs/{job_id}/events") as watch:
                lines = watch.aiter_lines()
                await anext(lines)
                gateway.stop()
                _ = [line async for line in lines]  # a clean end, not a broken connection
            assert await _ending_of(rpc_watch) is grpc.StatusCode.UNAVAILABLE
            worker.curtain.set()
            assert (await call).status_code == 200
    assert await ended(queue, job_id) == "completed"


async def _ending_of(call: Any) -> grpc.StatusCode:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_what_outlasts_the_drain_is_cancelled(
    settings: Settings, queue: JobQueue, worker: ScriptedWorker
) -> None:
    worker.curtain.clear()
    hasty = settings.model_copy(update={"drain_seconds": 0})
    async with running(Gateway(hasty, queue)) as gateway:
        url = f"http://127.0.0.1:{gateway.http_port}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            call = asyncio.create_task(http.post("/v1/images/generations", json=APPLE))
            job_id = await worker.next_job()
            gateway.stop()
            assert await ended(queue, job_id) == "cancelled"
            answer = await call  # that the HTTP server cancels it must not look like a fault of ours
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "unavailable"
            assert "Retry-After" in answer.headers


async def test_a_draining_gateway_takes_nothing_on(gateway: Gateway, http: httpx.AsyncClient, worker: object) -> None:
    job = (await http.post("/v1/jobs", json=APPLE)).json()
    gateway.service.drain()
    for reply in (
        await http.get("/readyz"),
        await http.get(f"/v1/jobs/{job['id']}/events"),
        await http.post("/v1/jobs", json=APPLE),
        await http.post("/v1/images/generations", json=APPLE),
    ):
        assert reply.status_code == 503
        assert "shutting down" in reply.text
    assert (await http.get("/healthz")).status_code == 200


async def test_the_process_is_light_and_leaves_on_sigterm(settings: Settings, queue: JobQueue) -> None:
    program = (
        "import asyncio, sys\n"
        "from patchforge.service.gateway.app import serve_gateway\n"
        "from patchforge.service.logs import configure_logs\n"
        "from patchforge.service.settings import Settings\n"
        "loaded = {'torch', 'numpy', 'patchforge.model'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "configure_logs(Settings(), 'gateway')\n"
        "asyncio.run(serve_gateway(Settings()))\n"
    )
    variables = {"REDIS_URL": settings.redis_url or "", "HTTP_PORT": "0", "GRPC_PORT": "0", "LOG_JSON": "true"}
    await queue.announce("scripted", CARDS)
    process = Process("gateway", *PYTHON, program, **{f"PATCHFORGE_{name}": text for name, text in variables.items()})
    try:
        await asyncio.to_thread(process.wait_for, "ready for requests")
        assert process.memory() < 200 << 20
        assert await asyncio.to_thread(process.terminate) == 0
    finally:
        process.close()
    assert process.lines("gateway is shutting down")


async def test_the_openapi_document_shows_the_bodies_we_parse_ourselves(http: httpx.AsyncClient) -> None:
    document: dict[str, Any] = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path, name in (("/v1/jobs", "GenerationRequest"), ("/v1/images/generations", "ImagesRequest")):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert {"prompt", "sampler", "seed"} <= set(schemas[name]["properties"])
    for reference in json.dumps(document).split('"#/components/schemas/')[1:]:
        assert reference.partition('"')[0] in schemas
    assert (await http.get("/docs")).status_code == 200


async def test_the_playground_needs_nothing_but_this_server(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype html>", "")
    for name in ("app.js", "style.css"):
        assert f"playground/{name}" in page.text
        first = await http.get(f"/playground/{name}")
        assert first.status_code == 200
        again = await http.get(f"/playground/{name}", headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code == 304

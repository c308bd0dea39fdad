"""What might not fit into the queue server's memory is refused before it is accepted, in every protocol."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import openai
import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.service.gateway.batches.kit import begin, native, results, until
from tests.service.gateway.harness import ScriptedWorker, ended

LARGE: dict[str, Any] = {"width": 1448, "height": 1448, "previews": False}  # 6 MB a picture
JOB = LARGE | {"prompt": "apple"}


@pytest.fixture
def settings(queue_server: EmbeddedServer) -> Settings:
    return Settings(
        redis_url=queue_server.url, http_port=0, grpc_port=0, drain_seconds=1, redis_memory_bytes=60_000_000
    )


async def test_a_job_waits_for_room_or_never_gets_it(
    http: httpx.AsyncClient, url: str, stub: pb_grpc.ImageServiceStub, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    first = await http.post("/v1/jobs", json=JOB | {"n": 5})
    assert first.status_code == 202
    memory = await queue.memory()
    assert 5 * 3 * 1448 * 1448 < memory.reserved < memory.admission_limit == 54_000_000 < memory.limit

    second = await http.post("/v1/jobs", json=JOB | {"n": 5})
    assert (second.status_code, second.json()["code"], "Retry-After" in second.headers) == (503, "queue_full", True)
    assert "this may need 31." in second.json()["detail"]
    assert "of 54.0 MB are free" in second.json()["detail"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(**JOB, n=5)))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="has no room"):
            await client.images.generate(model="tiny-text", prompt="apple", n=5, size="1448x1448")  # type: ignore[arg-type]
    assert "patchforge_memory_refusals_total 3.0" in (await http.get("/metrics")).text

    never = await http.post("/v1/jobs", json=JOB | {"n": 10})
    assert (never.status_code, never.json()["code"]) == (422, "invalid_request")
    assert "they may need 63." in never.json()["detail"]

    worker.curtain.set()
    assert await ended(queue, first.json()["id"]) == "completed"
    assert (await http.post("/v1/jobs", json=JOB | {"n": 5})).status_code == 202


async def test_a_line_that_never_fits_does_not_stop_its_batch(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    batch = await until(http, await begin(http, native("never", **LARGE, n=10), native("fits", **LARGE)))
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert (await results(http, batch, "error"))["never"]["response"]["status_code"] == 422

"""Both clients against a real gateway: pictures, events, refusals, broken connections and leaving."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from patchforge.service.client import AsyncClient, Client, JobCancelled, UnexpectedAnswer, Unreachable
from patchforge.service.embedded import free_port
from patchforge.service.errors import (
    IdempotencyConflict,
    InvalidRequest,
    JobFailed,
    NotFound,
    NotReady,
    PatchforgeError,
    Unauthenticated,
)
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.auth import make_entry
from patchforge.service.messages.events import Event
from patchforge.service.messages.samplers import DualLoop
from patchforge.service.messages.schemas import GenerationRequest, JobStatus
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.client.conftest import Wire
from tests.service.gateway.harness import CARDS, ScriptedWorker, ended, png, running

KINDS = ["queued", "started", *["preview"] * 8, "image", "completed"]


class Both:
    """A sync client in a thread and an async one, behind the same methods."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        self.client = Client(url, **options) if kind == "sync" else AsyncClient(url, **options)

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        bound = getattr(self.client, method)
        if isinstance(self.client, Client):
            return await asyncio.to_thread(bound, *arguments, **options)
        return await bound(*arguments, **options)

    async def events(self, job_id: str, after: str | None = None) -> list[tuple[str, Event]]:
        if isinstance(self.client, Client):
            watch = self.client.watch
            return await asyncio.to_thread(lambda: list(watch(job_id, after)))
        return [each async for each in self.client.watch(job_id, after)]

    async def close(self) -> None:
        await (asyncio.to_thread(self.client.close) if isinstance(self.client, Client) else self.client.aclose())


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(kind: str, url: str, worker: ScriptedWorker):
    both = Both(kind, url)
    yield both
    await both.close()


async def test_generate_gives_pictures_and_their_report(client: Both) -> None:
    seen: list[str] = []
    result = await client.call(
        "generate", model="tiny-text", prompt="a red apple", n=2, seed=7, on_event=lambda event: seen.append(event.type)
    )
    assert [picture.data for picture in result.pictures] == [png(7), png(8)]
    assert [picture.seed for picture in result.pictures] == [7, 8]
    assert result.pictures[0].image.size == (1, 1)
    assert result.report.patch_evaluations == 64
    assert result.job.status is JobStatus.COMPLETED
    assert seen == ["queued", "started", *["preview"] * 16, "image", "image", "completed"]


async def test_fields_replace_those_of_a_request_object(client: Both) -> None:
    request = GenerationRequest(model="tiny-text", prompt="a pear", seed=1, sampler=DualLoop(inner_steps=2))
    job = await client.call("submit", request, seed=2, guidance=2.0)
    assert job.request.model_dump() == request.model_dump() | {
        "model": "tiny-text",
        "seed": 2,
        "guidance": 2.0,
        "steps": 8,
    }


async def test_models(client: Both) -> None:
    assert await client.call("models") == sorted(CARDS, key=lambda card: card.name)


async def test_an_idempotency_key_gives_the_same_job(client: Both) -> None:
    first, second = [
        await client.call("submit", model="tiny-text", prompt="a pear", idempotency_key="once") for _ in range(2)
    ]
    assert first.id == second.id
    with pytest.raises(IdempotencyConflict):
        await client.call("submit", model="tiny-text", prompt="an apple", idempotency_key="once")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": "tiny-text", "prompt": "x", "steps": 0}, "steps"),
        ({"model": "tiny-text", "prompt": "x", "sampler": {"name": "dual_loop", "quantile": 2}}, "sampler.quantile"),
        ({"model": "tiny-class", "class_label": "unicorn"}, "class_label"),
        ({"model": "tiny-text", "prompt": "x", "colour": "red"}, "colour"),
    ],
)
async def test_a_refusal_names_its_field(client: Both, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.call("generate", **fields)
    assert caught.value.field == field
    assert caught.value.message


async def test_missing_jobs_models_and_pictures(client: Both, worker: ScriptedWorker) -> None:
    with pytest.raises(NotFound):
        await client.call("job", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    with pytest.raises(NotFound):
        await client.events("01ARZ3NDEKTSV4RRFFQ69G5FAV")
    with pytest.raises(NotFound) as caught:
        await client.call("submit", prompt="x", model="absent")
    assert caught.value.field == "model"
    worker.curtain.clear()
    job = await client.call("submit", model="tiny-text", prompt="a pear")
    with pytest.raises(NotReady):
        await client.call("picture", job)


async def test_a_job_that_fails(client: Both) -> None:
    with pytest.raises(JobFailed, match="the picture is too big") as caught:
        await client.call("generate", model="tiny-text", prompt="fail")
    assert caught.value.code == "out_of_memory"


async def test_a_job_that_another_caller_cancels(client: Both, worker: ScriptedWorker, queue: JobQueue) -> None:
    worker.curtain.clear()
    drawing = asyncio.create_task(client.call("generate", model="tiny-text", prompt="a pear"))
    await queue.cancel(await worker.next_job())
    with pytest.raises(JobCancelled):
        await drawing


async def test_watching_resumes_after_an_event(client: Both) -> None:
    job = await client.call("submit", model="tiny-text", prompt="a pear")
    whole = await client.events(job.id)
    assert [event.type for _, event in whole] == KINDS
    assert await client.events(job.id, whole[4][0]) == whole[5:]
    assert await client.events(job.id, whole[-1][0]) == []


async def test_a_broken_connection_loses_and_repeats_nothing(
    kind: str, wire: Wire, url: str, worker: ScriptedWorker
) -> None:
    worker.curtain.clear()
    broken, direct = Both(kind, wire.url), Both(kind, url)
    job = await direct.call("submit", model="tiny-text", prompt="a pear")
    watching = asyncio.create_task(broken.events(job.id))
    await worker.next_job()
    for _ in range(3):
        await wire.connected()
        wire.cut()
    worker.curtain.set()
    seen = await asyncio.wait_for(watching, PATIENCE)
    assert seen == await direct.events(job.id)
    await broken.close()
    await direct.close()


class Leaving(BaseException):
    """Like KeyboardInterrupt, without ending the test run."""


async def test_an_interruption_cancels_the_job(client: Both, worker: ScriptedWorker, queue: JobQueue) -> None:
    worker.curtain.clear()

    def leave(event: Event) -> None:
        if event.type == "preview":
            raise Leaving

    with pytest.raises(Leaving):
        await client.call("generate", model="tiny-text", prompt="a pear", on_event=leave)
    assert await ended(queue, await worker.next_job()) == "cancelled"


async def test_a_task_cancelled_while_it_submits_leaves_no_job_behind(
    wire: Wire, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    async with AsyncClient(wire.url) as client:
        wire.open.clear()  # the answer to the submit does not arrive
        drawing = asyncio.create_task(client.generate(model="tiny-text", prompt="a pear"))
        job_id = await worker.next_job()
        drawing.cancel()
        wire.open.set()
        with pytest.raises(asyncio.CancelledError):
            await drawing
    assert await ended(queue, job_id) == "cancelled"


async def test_keys(kind: str, settings: Settings, queue: JobQueue, worker: ScriptedWorker) -> None:
    locked = settings.model_copy(update={"api_keys": [make_entry("tester", "s3cret")]})
    async with running(Gateway(locked, queue)) as gateway:
        for key in (None, "wrong"):
            stranger = Both(kind, f"http://127.0.0.1:{gateway.http_port}", api_key=key)
            with pytest.raises(Unauthenticated):
                await stranger.call("generate", model="tiny-text", prompt="a pear")
            await stranger.close()
        tester = Both(kind, f"http://127.0.0.1:{gateway.http_port}", api_key="s3cret")
        assert (await tester.call("generate", model="tiny-text", prompt="a pear", seed=3)).pictures[0].data == png(3)
        await tester.close()


async def test_no_server(kind: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    both = Both(kind, url)
    with pytest.raises(Unreachable, match=url):
        await both.call("models")
    await both.close()


class Stranger(BaseHTTPRequestHandler):
    """Some other web server."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
        self.wfile.write(b"<h1>Hello</h1>")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


async def test_another_web_server(kind: str) -> None:
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        both = Both(kind, f"http://127.0.0.1:{server.server_port}")
        for method, arguments in (("models", ()), ("job", ("x",))):
            with pytest.raises(UnexpectedAnswer) as caught:
                await both.call(method, *arguments)
            assert isinstance(caught.value, PatchforgeError)
        await both.close()
        server.shutdown()

"""Clients of every kind: patient, impatient, forgetful, wrong. Each takes what comes and notes what must not."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import httpx

from service.pb.patchforge.v1 import image_service_pb2 as pb
from service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from service.soak.fleet import Member
from service.soak.ledger import Ledger, Watch

WORDS = ("red apple", "tiger face", "blue heart", "pizza", "clock", "tulip", "castle", "a cat, 3d")
AWAY = 503  # what a gateway answers while its queue server is away or full, or while it shuts down
RETRY_SECONDS = 0.3
FOLLOW_SECONDS = 240.0  # a client's patience with one job
TOLD_SECONDS = 60.0  # within which an end should have reached a watcher, whatever was killed meanwhile
REFUSALS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
NONSENSE: tuple[tuple[dict[str, Any] | bytes, set[int]], ...] = (
    ({"prompt": "x", "n": 10**9}, {422}),
    ({"prompt": "x", "steps": -1}, {422}),
    ({"prompt": "x", "model": "../../etc/passwd"}, {404, 422}),
    ({"prompt": 5}, {422}),
    ({}, {422}),
    (b'{"prompt": "x", "guidance": NaN}', {400, 422}),
    (b'{"prompt": ', {400, 422}),
    (b"[" * 10_000, {400, 422}),
    (b"\xff\xfe", {400, 422}),
    (b'{"prompt": "' + b"x" * (9 << 20) + b'"}', {413}),
)


class Client:
    """One caller, who does one thing after another at gateways chosen at random."""

    def __init__(self, gateways: Sequence[Member], ledger: Ledger, chance: random.Random) -> None:
        self.gateways, self.ledger, self.chance = gateways, ledger, chance
        self.models: list[dict[str, Any]] = []
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused, but dear to make for each connection

    async def run(self, done: asyncio.Event) -> None:
        """Until ``done``; then to the end of what it was at."""
        habits: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.watch_a_job, 6),
            (self.repeat_itself, 3),
            (self.wait_for_openai, 4),
            (self.leave_openai, 2),
            (self.stream_grpc, 4),
            (self.leave_grpc, 2),
            (self.submit_and_watch_grpc, 3),
            (self.change_its_mind, 3),
            (self.be_in_a_hurry, 2),
            (self.talk_nonsense, 2),
        ]
        actions, weights = zip(*habits, strict=True)
        while not done.is_set():
            try:
                await self._meet_models()
                await self.chance.choices(actions, weights)[0]()
            except (httpx.TransportError, TimeoutError):
                self.ledger.note("connection lost")
                await asyncio.sleep(RETRY_SECONDS)
            except grpc.aio.AioRpcError as error:
                self._note_status(error)
                await asyncio.sleep(RETRY_SECONDS)

    async def watch_a_job(self) -> None:
        if job_id := await self._submit(self._request()):
            await self._follow(job_id)

    async def repeat_itself(self) -> None:
        """The same request with the same key, to several gateways at once and until one answers: one job."""
        key, request = f"soak-{self.chance.getrandbits(64):x}", self._request()
        ids: set[str] = set()
        for _ in range(20):
            answers = await asyncio.gather(*(self._submit(request, key) for _ in range(3)), return_exceptions=True)
            ids |= {answer for answer in answers if isinstance(answer, str)}
            if ids:
                break
            await asyncio.sleep(RETRY_SECONDS)
        if len(ids) > 1:
            self.ledger.blame(f"one key made several jobs: {sorted(ids)}")
        if ids:
            await self._follow(ids.pop())

    async def wait_for_openai(self) -> None:
        """The answer, or an error: a worker may have died too often, or the gateway on the way."""
        async with self._http(FOLLOW_SECONDS) as http:
            answer = await http.post("/v1/images/generations", json=self._openai_request())
        self._note(answer, {200, 500})
        if answer.status_code == 500 and answer.json()["error"]["code"] != "job_failed":
            self.ledger.blame(f"images/generations: {answer.text[:200]}")

    async def leave_openai(self) -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            async with self._http(self.chance.uniform(0.05, 1.5)) as http:
                self._note(await http.post("/v1/images/generations", json=self._openai_request()), {200, 500})

    async def stream_grpc(self) -> None:
        async with self._stub() as stub:
            await self._generate(stub, FOLLOW_SECONDS)

    async def leave_grpc(self) -> None:
        """By cancelling, by a deadline, or by being gone."""
        async with self._stub() as stub:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(self.chance.uniform(0.05, 1.5)):
                    await self._generate(stub, self.chance.uniform(0.05, 2.0))

    async def submit_and_watch_grpc(self) -> None:
        async with self._stub() as stub:
            answer = await stub.SubmitJob(pb.SubmitJobRequest(generation=self._generation()), timeout=20)
        self.ledger.accept(answer.job.id)
        watch = Watch(answer.job.id, self.ledger)
        async with self._patience(watch):
            while watch.terminal is None:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async with self._stub() as stub:
                        request = pb.WatchJobRequest(job_id=watch.job_id, after_event_id=watch.last_id)
                        async for reply in stub.WatchJob(request, timeout=30):
                            watch.see(reply.event.id, str(reply.event.WhichOneof("event")))
                if watch.terminal is None:
                    await asyncio.sleep(RETRY_SECONDS)

    async def change_its_mind(self) -> None:
        if job_id := await self._submit(self._request()):
            await asyncio.sleep(self.chance.choice((0, 0.2, 1.0)))
            for _ in range(self.chance.randint(1, 3)):
                with contextlib.suppress(httpx.TransportError):
                    async with self._http() as http:
                        self._note(await http.delete(f"/v1/jobs/{job_id}"), {200})
            await self._follow(job_id)

    async def be_in_a_hurry(self) -> None:
        if job_id := await self._submit(self._request() | {"deadline_seconds": self.chance.choice((0.01, 0.5))}):
            await self._follow(job_id)

    async def talk_nonsense(self) -> None:
        body, expected = self.chance.choice(NONSENSE)
        content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        async with self._http() as http:
            path = self.chance.choice(("/v1/jobs", "/v1/images/generations"))
            headers = {"content-type": "application/json"}
            # OpenAI's API reports what the native one calls 422 as 400.
            self._note(await http.post(path, headers=headers, **content), expected | {400})
            self._note(await http.get("/v1/jobs/not-a-job"), {404})

    async def _generate(self, stub: Any, seconds: float) -> None:
        watch: Watch | None = None
        async for reply in stub.GenerateImage(pb.GenerateImageRequest(generation=self._generation()), timeout=seconds):
            if watch is None:
                self.ledger.accept(reply.job_id)
                watch = Watch(reply.job_id, self.ledger)
            watch.see(reply.event.id, str(reply.event.WhichOneof("event")))
        if watch is None or watch.terminal is None:
            self.ledger.blame("a gRPC stream ended well without a terminal event")
        self.ledger.note("gRPC OK")

    async def _submit(self, request: dict[str, Any], key: str | None = None) -> str | None:
        async with self._http() as http:
            answer = await http.post("/v1/jobs", json=request, headers={"Idempotency-Key": key} if key else {})
        self._note(answer, {202})
        if answer.status_code != 202:
            return None
        job_id: str = answer.json()["id"]
        self.ledger.accept(job_id)
        return job_id

    async def _follow(self, job_id: str) -> None:
        """Over as many connections as it takes, each going on where the last broke off."""
        watch = Watch(job_id, self.ledger)
        async with self._patience(watch):
            while watch.terminal is None:
                with contextlib.suppress(httpx.TransportError):
                    async with self._http(30) as http:
                        await self._listen(http, watch)
                if watch.terminal is None:
                    await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self, http: httpx.AsyncClient, watch: Watch) -> None:
        headers = {"Last-Event-ID": watch.last_id} if watch.last_id else {}
        async with http.stream("GET", f"/v1/jobs/{watch.job_id}/events", headers=headers) as stream:
            self._note(stream, {200})
            event_id = kind = ""
            async for line in stream.aiter_lines():
                name, _, value = line.partition(": ")
                event_id = value if name == "id" else event_id
                kind = value if name == "event" else kind
                if not line and kind:  # an event is whole only with the empty line after it
                    watch.see(event_id, kind)
                    kind = ""

    @contextlib.asynccontextmanager
    async def _patience(self, watch: Watch) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(FOLLOW_SECONDS):
                yield
        except TimeoutError:
            self.ledger.note("gave up waiting")  # the audit tells at the end whether the job had one
            with contextlib.suppress(httpx.TransportError):
                await self._ask_why(watch)

    async def _ask_why(self, watch: Watch) -> None:
        """On a busy machine a job may take that long; but one that has ended should have been told of."""
        async with self._http() as http:
            answer = await http.get(f"/v1/jobs/{watch.job_id}")
        self._note(answer, {200})
        finished = answer.json().get("finished_at") if answer.status_code == 200 else None
        if finished is not None and time.time() - finished > TOLD_SECONDS:
            self.ledger.blame(f"{watch.job_id}: ended {time.time() - finished:.0f} s ago, and its watcher was not told")

    async def _meet_models(self) -> None:
        while not self.models:
            async with self._http() as http:
                answer = await http.get("/v1/models")
            self.models = answer.json()["data"] if answer.status_code == 200 else []
            if not self.models:
                await asyncio.sleep(RETRY_SECONDS)

    def _subject(self) -> dict[str, Any]:
        model = self.chance.choice(self.models)
        classes = model["patchforge"]["classes"]
        subject = {"class_label": self.chance.choice(classes)} if classes else {"prompt": self.chance.choice(WORDS)}
        return {"model": model["id"], **subject}

    def _request(self) -> dict[str, Any]:
        steps = self.chance.choice((2, 4, 8, 8, 30))
        return self._subject() | {
            "n": self.chance.choice((1, 1, 1, 2, 4)),
            "steps": steps,
            "sampler": self.chance.choice(("euler", "dual_loop", "look_ahead")),
            "priority": self.chance.choice(("high", "normal", "low")),
            "previews": self.chance.random() < 0.5,
        }

    def _generation(self) -> pb.Generation:
        request = self._request()
        del request["sampler"], request["priority"]
        return pb.Generation(**request)

    def _openai_request(self) -> dict[str, Any]:
        subject = self._subject()
        prompt = subject.pop("class_label", None) or subject.pop("prompt")
        return {"model": subject["model"], "prompt": prompt, "n": 1, "steps": 4}

    def _http(self, seconds: float = 20.0) -> httpx.AsyncClient:
        """A new connection: real callers are many."""
        gateway = self.chance.choice(self.gateways)
        return httpx.AsyncClient(base_url=gateway.http, timeout=seconds, trust_env=False, verify=self._tls)

    @contextlib.asynccontextmanager
    async def _stub(self) -> AsyncIterator[Any]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.chance.choice(self.gateways).grpc, options) as channel:
            yield ImageServiceStub(channel)

    def _note(self, answer: httpx.Response, expected: set[int]) -> None:
        self.ledger.note(f"HTTP {answer.status_code}")
        if answer.status_code not in expected | {AWAY}:
            self.ledger.blame(f"{answer.request.method} {answer.request.url.path}: {answer.status_code}")

    def _note_status(self, error: grpc.aio.AioRpcError) -> None:
        self.ledger.note(f"gRPC {error.code().name}")
        if error.code() not in REFUSALS:
            self.ledger.blame(f"gRPC {error.code().name}: {error.details()}")

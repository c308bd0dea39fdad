"""Clients that wait, leave early, repeat themselves or send nonsense, and report every wrong answer."""

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
from httpx_sse import aconnect_sse

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from patchforge.service.soak.fleet import Member
from patchforge.service.soak.ledger import Ledger, Watch
from patchforge.service.soak.versions import TODAY

WORDS = ("red apple", "tiger face", "blue heart", "pizza", "clock", "tulip", "castle", "a cat, 3d")
AWAY = 503  # answer of a gateway whose queue server is away or full, or that is shutting down
RETRY_SECONDS = 0.3
FOLLOW_SECONDS = 240.0  # a client waits this long for one job
LATE_SECONDS = 60.0  # a watcher must get the terminal event within this time
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
    """One client: does one random action after another, at random gateways."""

    def __init__(
        self, gateways: Sequence[Member], ledger: Ledger, chance: random.Random, *, cut_answers: bool = False
    ) -> None:
        """`cut_answers`: some gateways are of a version that answers plain 500 to a call that outlasts their stop."""
        self.gateways, self.ledger, self.chance = gateways, ledger, chance
        self._cut_answers = cut_answers
        self.models: list[dict[str, Any]] = []
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # unused, but expensive to make for every connection

    async def run(self, done: asyncio.Event) -> None:
        """Act until `done` is set, then finish the current action."""
        actions: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.watch_a_job, 6),
            (self.repeat_a_request, 3),
            (self.wait_for_openai, 4),
            (self.leave_openai, 2),
            (self.stream_grpc, 4),
            (self.leave_grpc, 2),
            (self.submit_and_watch_grpc, 3),
            (self.cancel_a_job, 3),
            (self.set_a_deadline, 2),
            (self.send_nonsense, 2),
        ]
        calls, weights = zip(*actions, strict=True)
        while not done.is_set():
            try:
                await self._fetch_models()
                await self.chance.choices(calls, weights)[0]()
            except (httpx.TransportError, TimeoutError):
                self.ledger.answers["connection lost"] += 1
                await asyncio.sleep(RETRY_SECONDS)
            except grpc.aio.AioRpcError as error:
                self._check_status(error)
                await asyncio.sleep(RETRY_SECONDS)

    async def watch_a_job(self) -> None:
        if job_id := await self._submit(self._request()):
            await self._follow(job_id)

    async def repeat_a_request(self) -> None:
        """Send one request with one key several times at once, until an answer comes: it must make one job.

        Only at gateways of this version: older ones accept a repeated request before replicas have its job, so a
        failover may lose it. Where there are none, the request is sent once.
        """
        key, request = f"soak-{self.chance.getrandbits(64):x}", self._request()
        ids: set[str] = set()
        for _ in range(20):
            if not (todays := [gateway for gateway in self.gateways if gateway.version == TODAY]):
                if job_id := await self._submit(request):
                    await self._follow(job_id)
                return
            repeated = (self._submit(request, key, todays) for _ in range(3))
            answers = await asyncio.gather(*repeated, return_exceptions=True)
            ids |= {answer for answer in answers if isinstance(answer, str)}
            if ids:
                break
            await asyncio.sleep(RETRY_SECONDS)
        if len(ids) > 1:
            self.ledger.broken.append(f"one key made several jobs: {sorted(ids)}")
        if ids:
            await self._follow(ids.pop())

    async def wait_for_openai(self) -> None:
        """Wait for the pictures; an error is fine too, because workers and gateways may die on the way."""
        async with self._http(FOLLOW_SECONDS) as http:
            answer = await http.post("/v1/images/generations", json=self._openai_request())
        self._check_answer(answer, {200, 500})
        cut = self._cut_answers and "json" not in answer.headers.get("content-type", "")
        if answer.status_code == 500 and not cut and '"job_failed"' not in answer.text:
            self.ledger.broken.append(f"images/generations: {answer.text[:200]}")

    async def leave_openai(self) -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            async with self._http(self.chance.uniform(0.05, 1.5)) as http:
                self._check_answer(await http.post("/v1/images/generations", json=self._openai_request()), {200, 500})

    async def stream_grpc(self) -> None:
        async with self._stub() as stub:
            await self._generate(stub, FOLLOW_SECONDS)

    async def leave_grpc(self) -> None:
        """Leave a stream by a cancellation or by a deadline."""
        async with self._stub() as stub:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(self.chance.uniform(0.05, 1.5)):
                    await self._generate(stub, self.chance.uniform(0.05, 2.0))

    async def submit_and_watch_grpc(self) -> None:
        async with self._stub() as stub:
            answer = await stub.SubmitJob(pb.SubmitJobRequest(generation=self._generation()), timeout=20)
        self.ledger.accepted.add(answer.job.id)
        watch = Watch(answer.job.id, self.ledger)
        async with self._limit_wait(watch):
            while watch.terminal is None:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async with self._stub() as stub:
                        request = pb.WatchJobRequest(job_id=watch.job_id, after_event_id=watch.last_id)
                        async for reply in stub.WatchJob(request, timeout=30):
                            watch.see(reply.event.id, str(reply.event.WhichOneof("event")))
                if watch.terminal is None:
                    await asyncio.sleep(RETRY_SECONDS)

    async def cancel_a_job(self) -> None:
        if job_id := await self._submit(self._request()):
            await asyncio.sleep(self.chance.choice((0, 0.2, 1.0)))
            for _ in range(self.chance.randint(1, 3)):
                with contextlib.suppress(httpx.TransportError):
                    async with self._http() as http:
                        self._check_answer(await http.delete(f"/v1/jobs/{job_id}"), {200})
            await self._follow(job_id)

    async def set_a_deadline(self) -> None:
        if job_id := await self._submit(self._request() | {"deadline_seconds": self.chance.choice((0.01, 0.5))}):
            await self._follow(job_id)

    async def send_nonsense(self) -> None:
        body, expected = self.chance.choice(NONSENSE)
        content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        async with self._http() as http:
            path = self.chance.choice(("/v1/jobs", "/v1/images/generations"))
            headers = {"content-type": "application/json"}
            # The OpenAI API answers 400 where the native API answers 422.
            self._check_answer(await http.post(path, headers=headers, **content), expected | {400})
            self._check_answer(await http.get("/v1/jobs/not-a-job"), {404})

    async def _generate(self, stub: Any, seconds: float) -> None:
        watch: Watch | None = None
        async for reply in stub.GenerateImage(pb.GenerateImageRequest(generation=self._generation()), timeout=seconds):
            if watch is None:
                self.ledger.accepted.add(reply.job_id)
                watch = Watch(reply.job_id, self.ledger)
            watch.see(reply.event.id, str(reply.event.WhichOneof("event")))
        if watch is None or watch.terminal is None:
            self.ledger.broken.append("a gRPC stream ended without an error and without a terminal event")
        self.ledger.answers["gRPC OK"] += 1

    async def _submit(
        self, request: dict[str, Any], key: str | None = None, gateways: Sequence[Member] = ()
    ) -> str | None:
        async with self._http(gateways=gateways) as http:
            answer = await http.post("/v1/jobs", json=request, headers={"Idempotency-Key": key} if key else {})
        self._check_answer(answer, {202})
        if answer.status_code != 202:
            return None
        job_id: str = answer.json()["id"]
        self.ledger.accepted.add(job_id)
        return job_id

    async def _follow(self, job_id: str) -> None:
        """Read a job's events to the end; after a broken connection, go on where it broke off."""
        watch = Watch(job_id, self.ledger)
        async with self._limit_wait(watch):
            while watch.terminal is None:
                with contextlib.suppress(httpx.TransportError):
                    async with self._http(30) as http:
                        await self._listen(http, watch)
                if watch.terminal is None:
                    await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self, http: httpx.AsyncClient, watch: Watch) -> None:
        headers = {"Last-Event-ID": watch.last_id} if watch.last_id else {}
        async with aconnect_sse(http, "GET", f"/v1/jobs/{watch.job_id}/events", headers=headers) as source:
            self._check_answer(source.response, {200})
            async with contextlib.aclosing(source.aiter_sse()) as events:
                async for event in events:
                    if event.data:  # httpx-sse also yields the empty line after a comment, such as a keep-alive
                        watch.see(event.id, event.event)

    @contextlib.asynccontextmanager
    async def _limit_wait(self, watch: Watch) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(FOLLOW_SECONDS):
                yield
        except TimeoutError:
            self.ledger.answers["gave up waiting"] += 1  # the audit finds out at the end whether the job ended
            with contextlib.suppress(httpx.TransportError):
                await self._check_late(watch)

    async def _check_late(self, watch: Watch) -> None:
        """A job may take this long on a busy machine, but if it has ended, its watcher must know."""
        async with self._http() as http:
            answer = await http.get(f"/v1/jobs/{watch.job_id}")
        self._check_answer(answer, {200})
        finished = answer.json().get("finished_at") if answer.status_code == 200 else None
        if finished is not None and time.time() - finished > LATE_SECONDS:
            late = f"{time.time() - finished:.0f} s"
            self.ledger.broken.append(f"{watch.job_id}: its watcher got no terminal event for {late} after its end")

    async def _fetch_models(self) -> None:
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

    def _http(self, seconds: float = 20.0, gateways: Sequence[Member] = ()) -> httpx.AsyncClient:
        """A new connection every time, because real clients are many; to one of `gateways`, or of all."""
        gateway = self.chance.choice(gateways or self.gateways)
        return httpx.AsyncClient(base_url=gateway.http, timeout=seconds, trust_env=False, verify=self._tls)

    @contextlib.asynccontextmanager
    async def _stub(self) -> AsyncIterator[Any]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self.chance.choice(self.gateways).grpc, options) as channel:
            yield ImageServiceStub(channel)

    def _check_answer(self, answer: httpx.Response, expected: set[int]) -> None:
        self.ledger.answers[f"HTTP {answer.status_code}"] += 1
        if answer.status_code not in expected | {AWAY}:
            self.ledger.broken.append(f"{answer.request.method} {answer.request.url.path}: {answer.status_code}")

    def _check_status(self, error: grpc.aio.AioRpcError) -> None:
        self.ledger.answers[f"gRPC {error.code().name}"] += 1
        if error.code() not in REFUSALS:
            self.ledger.broken.append(f"gRPC {error.code().name}: {error.details()}")

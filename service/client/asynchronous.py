"""The same client for programs with an event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import aconnect_sse

from service.client import wire
from service.client.errors import UnexpectedAnswer, Unreachable, raise_for, unreachable
from service.client.results import Picture, Result
from service.errors import PatchforgeError, Unavailable
from service.events import TERMINAL_EVENTS, Completed, Event
from service.outcomes import raise_if_lost
from service.schemas import GenerationRequest, Job, ModelCard


class AsyncClient:
    """Talks to one server; use it as an async context manager, or `aclose` it. Its methods are those of `Client`."""

    def __init__(
        self,
        url: str = wire.DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = wire.TIMEOUT_SECONDS,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        """``timeout``: seconds of silence after which a connection counts as broken; ``verify``: as in httpx."""
        self._http = httpx.AsyncClient(base_url=url, headers=wire.headers(api_key), timeout=timeout, verify=verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def models(self) -> list[ModelCard]:
        """What can be asked for now."""
        return wire.cards(await self._send("GET", "/v1/models"))

    async def submit(
        self, request: GenerationRequest | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """Queues a job that lives on without its caller; ``fields`` are those of :class:`GenerationRequest`."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        sent = await self._send("POST", "/v1/jobs", json=wire.body(request, fields), headers=headers)
        return wire.parsed(Job, sent)

    async def job(self, job_id: str) -> Job:
        """A job as it stands; with its report once it has completed."""
        return wire.parsed(Job, await self._send("GET", f"/v1/jobs/{job_id}"))

    async def cancel(self, job_id: str) -> Job:
        """Cancels a job; harmless on one that has ended."""
        return wire.parsed(Job, await self._send("DELETE", f"/v1/jobs/{job_id}"))

    async def picture(self, job: Job, index: int = 0) -> Picture:
        """A finished picture."""
        return wire.picture(await self._send("GET", f"/v1/jobs/{job.id}/image", params={"index": index}), job, index)

    async def watch(self, job_id: str, after: str | None = None) -> AsyncGenerator[tuple[str, Event], None]:
        """A job's events with their ids, from the one after ``after`` to its end; broken connections are resumed."""
        path = f"/v1/jobs/{job_id}/events"
        place = wire.Place(self._http.base_url.join(path), after)
        while True:
            broken: httpx.TransportError | PatchforgeError | None = None
            before = place.after
            try:
                async with aconnect_sse(self._http, "GET", path, headers=place.headers) as source:
                    if not source.response.is_success:
                        await source.response.aread()
                        raise_for(source.response)
                    async with aclosing(source.aiter_sse()) as stream:
                        async for sent in stream:
                            event = place.take(sent)
                            if event is not None:
                                yield sent.id, event
                            if isinstance(event, TERMINAL_EVENTS):
                                return
                if place.after == before:  # nothing more may ever come: the job has ended, and we had seen it end
                    if place.over:
                        return
                    place.over = (await self.job(job_id)).status.terminal
            except (httpx.TransportError, Unavailable, Unreachable) as error:
                broken = error
            await asyncio.sleep(place.wait(broken))

    async def generate(
        self,
        request: GenerationRequest | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        **fields: Any,
    ) -> Result:
        """Draws pictures and waits for them. Whatever interrupts the wait, cancellation included, cancels the job.

        ``on_event`` is told of every event. A job that does not complete raises :class:`JobFailed`.
        """
        job = await self._submit_or_cancel(request, fields)
        ended = False
        try:
            async with aclosing(self.watch(job.id)) as events:
                async for _, event in events:
                    ended = isinstance(event, TERMINAL_EVENTS)
                    if on_event is not None:
                        on_event(event)
                    raise_if_lost(event)
                    if isinstance(event, Completed):
                        pictures = [await self.picture(job, index) for index in range(job.request.n)]
                        return Result(await self.job(job.id), pictures, event.report)
        except BaseException:
            if not ended:
                with suppress(PatchforgeError):
                    await self.cancel(job.id)
            raise
        raise UnexpectedAnswer("the job's events broke off")

    async def _submit_or_cancel(self, request: GenerationRequest | None, fields: dict[str, Any]) -> Job:
        submitting = asyncio.ensure_future(self.submit(request, **fields))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the server may accept the job all the same, and nobody waits for it now
            with suppress(PatchforgeError):
                await self.cancel((await submitting).id)
            raise

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error

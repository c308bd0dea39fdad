"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import aconnect_sse

from patchforge.service.client import wire
from patchforge.service.client.errors import UnexpectedAnswer, Unreachable, raise_for, unreachable
from patchforge.service.client.results import Picture, Result
from patchforge.service.errors import PatchforgeError, Unavailable
from patchforge.service.messages.endings import raise_if_lost
from patchforge.service.messages.events import TERMINAL_EVENTS, Completed, Event
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard


class AsyncClient:
    """Talks to one server; use it as an async context manager, or call `aclose`.

    It has the methods of `Client`, which raise the same errors.

    >>> import asyncio
    >>> from patchforge import AsyncClient
    >>> async def draw(*prompts):
    ...     async with AsyncClient("http://127.0.0.1:8000") as client:
    ...         calls = [client.generate(model="emoji-text", prompt=prompt, seed=7) for prompt in prompts]
    ...         return await asyncio.gather(*calls)  # in flight together, they share network evaluations
    >>> [made.pictures[0].content_type for made in asyncio.run(draw("blue heart", "cat face"))]
    ['image/png', 'image/png']
    """

    def __init__(
        self,
        url: str = wire.DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = wire.TIMEOUT_SECONDS,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        """`timeout`: seconds of silence before a connection counts as broken. `verify`: as in httpx."""
        self._http = httpx.AsyncClient(base_url=url, headers=wire.headers(api_key), timeout=timeout, verify=verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def models(self) -> list[ModelCard]:
        """The models that the server can use now."""
        return wire.cards(await self._send("GET", "/v1/models"))

    async def submit(
        self, request: GenerationRequest | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """Queue a job, which goes on without its caller; `fields` are the fields of `GenerationRequest`."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        sent = await self._send("POST", "/v1/jobs", json=wire.body(request, fields), headers=headers)
        return wire.parsed(Job, sent)

    async def job(self, job_id: str) -> Job:
        """The current state of a job; includes its report if it has completed."""
        return wire.parsed(Job, await self._send("GET", f"/v1/jobs/{job_id}"))

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job; do nothing if it has ended."""
        return wire.parsed(Job, await self._send("DELETE", f"/v1/jobs/{job_id}"))

    async def picture(self, job: Job, index: int = 0) -> Picture:
        """A finished picture of a job.

        Raises:
            NotReady: the job has no picture yet, or will never have one.
        """
        return wire.picture(await self._send("GET", f"/v1/jobs/{job.id}/image", params={"index": index}), job, index)

    async def watch(self, job_id: str, after: str | None = None) -> AsyncGenerator[tuple[str, Event], None]:
        """The events of a job with their ids, from the event after the id `after` to the end.

        Broken connections are resumed, without lost or repeated events.
        """
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
                    if source.response.status_code == httpx.codes.NO_CONTENT:  # the job has ended
                        return
                    async with aclosing(source.aiter_sse()) as stream:
                        async for sent in stream:
                            event = place.take(sent)
                            if event is not None:
                                yield sent.id, event
                            if isinstance(event, TERMINAL_EVENTS):
                                return
                if place.after == before:  # no event came; if the job ended before this connection, none will
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
        """Draw pictures and wait for them. An interruption, such as cancellation of the task, cancels the job.

        `fields` are the fields of `GenerationRequest`; `on_event` gets every event.

        Raises:
            JobFailed: the job failed, was cancelled, or expired.
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
        raise UnexpectedAnswer("the job's events ended without a final event")

    async def _submit_or_cancel(self, request: GenerationRequest | None, fields: dict[str, Any]) -> Job:
        submitting = asyncio.ensure_future(self.submit(request, **fields))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the server may still accept the job, but nobody waits for it
            with suppress(PatchforgeError):
                await self.cancel((await submitting).id)
            raise

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error

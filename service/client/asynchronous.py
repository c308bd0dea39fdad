"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import aconnect_sse

from patchforge.service.client import wire
from patchforge.service.client.errors import UnexpectedAnswer, Unreachable, raise_for, unreachable
from patchforge.service.client.results import Picture, Result
from patchforge.service.errors import PatchforgeError, Unavailable
from patchforge.service.messages.batches import Batch, BatchResult
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

    async def create_batch(
        self,
        requests: wire.Requests,
        *,
        endpoint: str | None = None,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Batch:
        """Begin a batch, which is drawn in the background. `requests` is a file of lines, or what its lines say.

        Each has a `custom_id`, the `url` of its endpoint if `endpoint` is None, and the `body` of a call there.
        """
        form = wire.batch_form(requests, endpoint, completion_window, metadata)
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return wire.parsed(Batch, await self._send("POST", "/v1/batches", headers=headers, **form))

    async def batch(self, batch_id: str) -> Batch:
        """The current state of a batch."""
        return wire.parsed(Batch, await self._send("GET", f"/v1/batches/{batch_id}"))

    async def batches(self, after: str | None = None, limit: int = 20) -> list[Batch]:
        """The batches after the one with the id `after`, the newest first."""
        params = {"limit": limit} if after is None else {"limit": limit, "after": after}
        return wire.batches(await self._send("GET", "/v1/batches", params=params))

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Cancel a batch; what is finished stays. Do nothing if it has ended."""
        return wire.parsed(Batch, await self._send("POST", f"/v1/batches/{batch_id}/cancel"))

    async def delete_batch(self, batch_id: str) -> None:
        """Delete a batch that has ended, with its results and pictures.

        Raises:
            NotReady: it has not ended.
        """
        raise_for(await self._send("DELETE", f"/v1/batches/{batch_id}"))

    async def wait_for_batch(self, batch_id: str, *, poll_seconds: float = wire.POLL_SECONDS) -> Batch:
        """Wait until a batch has ended, in whatever way."""
        while True:
            batch = await self.batch(batch_id)
            if batch.ended:
                return batch
            await asyncio.sleep(poll_seconds)

    async def batch_results(self, batch: Batch) -> AsyncGenerator[BatchResult, None]:
        """The results of a batch that has ended, one at a time: what completed first, then what did not."""
        for path in wire.result_files(batch):
            try:
                async with self._http.stream("GET", path) as response:
                    if not response.is_success:
                        await response.aread()
                        raise_for(response)
                    async for line in response.aiter_lines():
                        yield wire.batch_result(line)
            except httpx.TransportError as error:
                raise unreachable(self._http.base_url, error) from error

    async def batch_pictures(self, result: BatchResult) -> list[Picture]:
        """The pictures of a completed request of a batch, fetched if they are not in the result.

        Raises:
            JobFailed: the request did not complete; `code` says why.
        """
        drawn = wire.Drawn.by(result)
        pictures = []
        for index, (data, image) in enumerate(zip(drawn.pictures, drawn.report.images, strict=False)):
            kind = drawn.content_type
            if data is None:
                sent = await self._send("GET", f"/v1/jobs/{drawn.job_id}/image", params={"index": index})
                raise_for(sent)
                data, kind = sent.content, sent.headers["content-type"]
            pictures.append(Picture(data, kind, image.seed))
        return pictures

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error

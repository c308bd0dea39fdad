"""The client for programs without an event loop."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import connect_sse

from patchforge.service.client import wire
from patchforge.service.client.errors import UnexpectedAnswer, Unreachable, raise_for, unreachable
from patchforge.service.client.results import Picture, Result
from patchforge.service.errors import PatchforgeError, Unavailable
from patchforge.service.messages.batches import Batch, BatchResult
from patchforge.service.messages.endings import raise_if_lost
from patchforge.service.messages.events import TERMINAL_EVENTS, Completed, Event
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard


class Client:
    """Talks to one server; use it as a context manager, or call `close`.

    >>> from patchforge import Client
    >>> with Client("http://127.0.0.1:8000") as client:
    ...     made = client.generate(model="emoji-text", prompt="red apple, 3d", seed=7)
    >>> made.pictures[0].save("apple.png")
    >>> print(f"saved {made.report.savings_ratio:.0%} of the dense run's patch evaluations")  # doctest: +ELLIPSIS
    saved ...% of the dense run's patch evaluations

    Every method raises a `PatchforgeError`: one of `patchforge.service.errors` if the server refuses, with the request
    `field` at fault; `Unreachable` if no server answers; `UnexpectedAnswer` if something else answers.

    >>> from patchforge import PatchforgeError
    >>> with Client("http://127.0.0.1:8000") as client:
    ...     try:
    ...         client.submit(model="emoji-text", prompt="red apple, 3d", steps=0)
    ...     except PatchforgeError as error:
    ...         print(error.code, error.field)
    invalid_request steps
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
        self._http = httpx.Client(base_url=url, headers=wire.headers(api_key), timeout=timeout, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def models(self) -> list[ModelCard]:
        """The models that the server can use now."""
        return wire.cards(self._send("GET", "/v1/models"))

    def submit(
        self, request: GenerationRequest | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """Queue a job, which goes on without its caller; `fields` are the fields of `GenerationRequest`.

        >>> with Client("http://127.0.0.1:8000") as client:
        ...     job = client.submit(model="emoji-text", prompt="blue heart", steps=6)
        ...     kinds = [event.type for _, event in client.watch(job.id)]
        ...     picture = client.picture(job)
        >>> kinds[0], kinds[-1]
        ('queued', 'completed')
        """
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return wire.parsed(Job, self._send("POST", "/v1/jobs", json=wire.body(request, fields), headers=headers))

    def job(self, job_id: str) -> Job:
        """The current state of a job; includes its report if it has completed."""
        return wire.parsed(Job, self._send("GET", f"/v1/jobs/{job_id}"))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; do nothing if it has ended."""
        return wire.parsed(Job, self._send("DELETE", f"/v1/jobs/{job_id}"))

    def picture(self, job: Job, index: int = 0) -> Picture:
        """A finished picture of a job.

        Raises:
            NotReady: the job has no picture yet, or will never have one.
        """
        return wire.picture(self._send("GET", f"/v1/jobs/{job.id}/image", params={"index": index}), job, index)

    def watch(self, job_id: str, after: str | None = None) -> Generator[tuple[str, Event], None, None]:
        """The events of a job with their ids, from the event after the id `after` to the end.

        Broken connections are resumed, without lost or repeated events.
        """
        path = f"/v1/jobs/{job_id}/events"
        place = wire.Place(self._http.base_url.join(path), after)
        while True:
            broken: httpx.TransportError | PatchforgeError | None = None
            before = place.after
            try:
                with connect_sse(self._http, "GET", path, headers=place.headers) as source:
                    if not source.response.is_success:
                        source.response.read()
                        raise_for(source.response)
                    if source.response.status_code == httpx.codes.NO_CONTENT:  # the job has ended
                        return
                    for sent in source.iter_sse():
                        event = place.take(sent)
                        if event is not None:
                            yield sent.id, event
                        if isinstance(event, TERMINAL_EVENTS):
                            return
                if place.after == before:  # no event came; if the job ended before this connection, none will
                    if place.over:
                        return
                    place.over = self.job(job_id).status.terminal
            except (httpx.TransportError, Unavailable, Unreachable) as error:
                broken = error
            time.sleep(place.wait(broken))

    def generate(
        self,
        request: GenerationRequest | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        **fields: Any,
    ) -> Result:
        """Draw pictures and wait for them. An interruption, such as Ctrl-C, cancels the job.

        `fields` are the fields of `GenerationRequest`; `on_event` gets every event.

        >>> with Client("http://127.0.0.1:8000") as client:
        ...     result = client.generate(model="emoji-text", prompt="red apple", n=2, on_event=lambda event: None)
        >>> len(result.pictures)
        2

        Raises:
            JobFailed: the job failed, was cancelled, or expired.
        """
        job = self.submit(request, **fields)
        ended = False
        try:
            with closing(self.watch(job.id)) as events:
                for _, event in events:
                    ended = isinstance(event, TERMINAL_EVENTS)
                    if on_event is not None:
                        on_event(event)
                    raise_if_lost(event)
                    if isinstance(event, Completed):
                        pictures = [self.picture(job, index) for index in range(job.request.n)]
                        return Result(self.job(job.id), pictures, event.report)
        except BaseException:
            if not ended:
                with suppress(PatchforgeError):
                    self.cancel(job.id)
            raise
        raise UnexpectedAnswer("the job's events ended without a final event")

    def create_batch(
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

        >>> wanted = [{"custom_id": name, "body": {"prompt": name, "steps": 4}} for name in ("cat face", "pizza")]
        >>> with Client("http://127.0.0.1:8000") as client:
        ...     batch = client.wait_for_batch(client.create_batch(wanted, endpoint="/v1/jobs").id)
        ...     made = {each.custom_id: client.batch_pictures(each) for each in client.batch_results(batch)}
        >>> sorted(made), len(made["pizza"])
        (['cat face', 'pizza'], 1)
        """
        form = wire.batch_form(requests, endpoint, completion_window, metadata)
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return wire.parsed(Batch, self._send("POST", "/v1/batches", headers=headers, **form))

    def batch(self, batch_id: str) -> Batch:
        """The current state of a batch."""
        return wire.parsed(Batch, self._send("GET", f"/v1/batches/{batch_id}"))

    def batches(self, after: str | None = None, limit: int = 20) -> list[Batch]:
        """The batches after the one with the id `after`, the newest first."""
        params = {"limit": limit} if after is None else {"limit": limit, "after": after}
        return wire.batches(self._send("GET", "/v1/batches", params=params))

    def cancel_batch(self, batch_id: str) -> Batch:
        """Cancel a batch; what is finished stays. Do nothing if it has ended."""
        return wire.parsed(Batch, self._send("POST", f"/v1/batches/{batch_id}/cancel"))

    def delete_batch(self, batch_id: str) -> None:
        """Delete a batch that has ended, with its results and pictures.

        Raises:
            NotReady: it has not ended.
        """
        raise_for(self._send("DELETE", f"/v1/batches/{batch_id}"))

    def wait_for_batch(self, batch_id: str, *, poll_seconds: float = wire.POLL_SECONDS) -> Batch:
        """Wait until a batch has ended, in whatever way."""
        while not (batch := self.batch(batch_id)).ended:
            time.sleep(poll_seconds)
        return batch

    def batch_results(self, batch: Batch) -> Generator[BatchResult, None, None]:
        """The results of a batch that has ended, one at a time: what completed first, then what did not."""
        for path in wire.result_files(batch):
            try:
                with self._http.stream("GET", path) as response:
                    if not response.is_success:
                        response.read()
                        raise_for(response)
                    for line in response.iter_lines():
                        yield wire.batch_result(line)
            except httpx.TransportError as error:
                raise unreachable(self._http.base_url, error) from error

    def batch_pictures(self, result: BatchResult) -> list[Picture]:
        """The pictures of a completed request of a batch, fetched if they are not in the result.

        Raises:
            JobFailed: the request did not complete; `code` says why.
        """
        drawn = wire.Drawn.by(result)
        pictures = []
        for index, (data, image) in enumerate(zip(drawn.pictures, drawn.report.images, strict=False)):
            kind = drawn.content_type
            if data is None:
                sent = self._send("GET", f"/v1/jobs/{drawn.job_id}/image", params={"index": index})
                raise_for(sent)
                data, kind = sent.content, sent.headers["content-type"]
            pictures.append(Picture(data, kind, image.seed))
        return pictures

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error

"""The client for ordinary programs."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import connect_sse

from service.client import wire
from service.client.errors import UnexpectedAnswer, Unreachable, raise_for, unreachable
from service.client.results import Picture, Result
from service.errors import PatchforgeError, Unavailable
from service.events import TERMINAL_EVENTS, Completed, Event
from service.outcomes import raise_if_lost
from service.schemas import GenerationRequest, Job, ModelCard


class Client:
    """Talks to one server; use it as a context manager, or `close` it.

    Every method raises :class:`PatchforgeError`: the server's refusal with its ``field``, or
    :class:`~service.client.Unreachable`.
    """

    def __init__(
        self,
        url: str = wire.DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = wire.TIMEOUT_SECONDS,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        """``timeout``: seconds of silence after which a connection counts as broken; ``verify``: as in httpx."""
        self._http = httpx.Client(base_url=url, headers=wire.headers(api_key), timeout=timeout, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections."""
        self._http.close()

    def models(self) -> list[ModelCard]:
        """What can be asked for now."""
        return wire.cards(self._send("GET", "/v1/models"))

    def submit(
        self, request: GenerationRequest | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """Queues a job that lives on without its caller; ``fields`` are those of :class:`GenerationRequest`."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return wire.parsed(Job, self._send("POST", "/v1/jobs", json=wire.body(request, fields), headers=headers))

    def job(self, job_id: str) -> Job:
        """A job as it stands; with its report once it has completed."""
        return wire.parsed(Job, self._send("GET", f"/v1/jobs/{job_id}"))

    def cancel(self, job_id: str) -> Job:
        """Cancels a job; harmless on one that has ended."""
        return wire.parsed(Job, self._send("DELETE", f"/v1/jobs/{job_id}"))

    def picture(self, job: Job, index: int = 0) -> Picture:
        """A finished picture."""
        return wire.picture(self._send("GET", f"/v1/jobs/{job.id}/image", params={"index": index}), job, index)

    def watch(self, job_id: str, after: str | None = None) -> Generator[tuple[str, Event], None, None]:
        """A job's events with their ids, from the one after ``after`` to its end; broken connections are resumed."""
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
                    for sent in source.iter_sse():
                        event = place.take(sent)
                        if event is not None:
                            yield sent.id, event
                        if isinstance(event, TERMINAL_EVENTS):
                            return
                if place.after == before:  # nothing more may ever come: the job has ended, and we had seen it end
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
        """Draws pictures and waits for them. Whatever interrupts the wait, Ctrl-C included, cancels the job.

        ``on_event`` is told of every event. A job that does not complete raises :class:`JobFailed`.
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
        raise UnexpectedAnswer("the job's events broke off")

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error

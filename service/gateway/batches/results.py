"""Writes the results of an ended batch in OpenAI's shape, a line at a time, from what its jobs left."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from patchforge.service.errors import NotFound, NotReady, PatchforgeError
from patchforge.service.gateway.batches.lines import JOBS, answer_with, custom_id_of, dumped
from patchforge.service.gateway.openai.drawing import build_response
from patchforge.service.messages.endings import raise_if_lost, terminal_event
from patchforge.service.messages.schemas import Job, JobStatus
from patchforge.service.queue import GatewayQueue
from patchforge.service.queue.batch_records import RESULT_GONE, UNSETTLED, SettledLine, StoredBatch

GIVEN_UP = {
    "expired": ("batch_expired", "this request could not be executed before the completion window expired"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was executed"),
}
GONE = "result_expired", "the result of this request has expired, or someone deleted it"


class BatchResults:
    """The two files of an ended batch. Some hundred lines are in memory at a time, and the pictures of one."""

    def __init__(self, queue: GatewayQueue, stored: StoredBatch, url_of: Callable[[str, int], str]) -> None:
        """`url_of` makes the address of a picture from its job's id and its index."""
        self._queue = queue
        self._stored = stored
        self._url_of = url_of

    async def output(self) -> AsyncGenerator[bytes, None]:
        """Yields a line for each request that completed, in the order of the file."""
        async for line in self._queue.settled_lines(self._stored, "output"):
            try:
                answer = {"response": await self._answer(line), "error": None}
            except (NotFound, NotReady):
                answer = _failure(*GONE)
            yield self._dump(line.number, line.details.get("custom_id"), answer)

    async def errors(self) -> AsyncGenerator[bytes, None]:
        """Yields a line for every other request, in the order of the file."""
        async for line in self._queue.settled_lines(self._stored, "error"):
            yield self._dump(line.number, line.details.get("custom_id"), await self._failed(line))
        async for number, text in self._queue.unsettled_lines(self._stored):
            if text.strip():
                yield self._dump(number, custom_id_of(text), self._given_up())

    def _dump(self, number: int, custom_id: str | None, answer: dict[str, Any]) -> bytes:
        return dumped({"id": self._stored.name_of(number), "custom_id": custom_id, **answer})

    async def _answer(self, line: SettledLine) -> dict[str, Any]:
        if line.outcome == RESULT_GONE:
            raise NotFound("its result is not in the object store any more")
        job = line.job or await self._queue.get(line.details["job"])
        if job.report is None:
            raise NotReady("its report cannot be read")
        links = await self._queue.picture_links(job.id)
        if line.details["url"] == JOBS:
            urls = [links.get(index) or self._url_of(job.id, index) for index in range(job.request.n)]
            body = job.model_dump(mode="json") | {"urls": urls, "expires_at": self._stored.batch.patchforge.kept_until}
        else:
            chosen = line.details.get("response_format")
            images = [await self._image(job, index, chosen, links) for index in range(job.request.n)]
            body = build_response(job, job.report, images, int(job.finished_at or 0)) | line.details["repeat"]
            body["patchforge"]["expires_at"] = self._stored.batch.patchforge.kept_until
        return {"status_code": 200, "request_id": job.id, "body": body}

    async def _image(self, job: Job, index: int, chosen: str | None, links: Mapping[int, str]) -> dict[str, str]:
        """In both forms unless one was chosen, as the Images API answers."""
        image = {}
        if chosen != "url":
            image["b64_json"] = b64encode(await self._queue.image(job.id, index)).decode("ascii")
        if chosen != "b64_json":
            image["url"] = links.get(index) or self._url_of(job.id, index)
        return image

    def _given_up(self) -> dict[str, Any]:
        return _failure(*GIVEN_UP.get(self._stored.batch.status, GONE))

    async def _failed(self, line: SettledLine) -> dict[str, Any]:
        if line.outcome == UNSETTLED:
            return self._given_up()
        if line.outcome == RESULT_GONE:
            return _failure(*GONE)
        if "job" not in line.details:
            return {"response": line.details.get("response"), "error": line.details.get("error")}
        try:
            job = line.job or await self._queue.get(line.details["job"])
        except NotFound:
            return _failure(*GONE)
        given_up = GIVEN_UP.get(self._stored.batch.status)
        if given_up is not None and job.status is JobStatus.CANCELLED:
            return _failure(*given_up)
        try:
            raise_if_lost(terminal_event(job))
        except PatchforgeError as error:
            return {"response": answer_with(error, line.details["url"], job.id), "error": None}
        return _failure(*GONE)


def _failure(code: str, message: str) -> dict[str, Any]:
    return {"response": None, "error": {"code": code, "message": message}}

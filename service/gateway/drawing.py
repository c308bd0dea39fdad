"""One call of the Images API, from its request to the answer or the events OpenAI's clients expect."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from sse_starlette import ServerSentEvent

from service.errors import PatchforgeError, Unavailable
from service.events import Completed, Preview
from service.gateway.images_request import OpenAIRequest
from service.gateway.jobs import JobService, Run
from service.gateway.problems import Problem
from service.outcomes import raise_if_lost
from service.sampler_options import Quality
from service.schemas import ModelCard, SavingsReport

LEVELS = {Quality.DRAFT: "low", Quality.STANDARD: "medium", Quality.HIGH: "high"}
"""What OpenAI calls our presets."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call, and how its answers reach it."""

    tenant: str | None
    idempotency_key: str | None
    url_of: Callable[[str, int], str]
    """The address of a job's picture."""


class Drawing:
    """``kind`` is what its events are called after: ``image_generation`` or ``image_edit``."""

    def __init__(self, service: JobService, caller: Caller, card: ModelCard, body: OpenAIRequest, kind: str) -> None:
        self.service = service
        self.caller = caller
        self.card = card
        self.body = body
        self.kind = kind
        self.generation = body.generation(card)

    async def begin(self) -> Run:
        return await self.service.run(self.generation, self.caller.tenant, self.caller.idempotency_key)

    async def complete(self) -> dict[str, Any]:
        async with await self.begin() as run:
            async for _, event in run:
                if isinstance(event, Completed):
                    return await self._response(run, event.report)
                raise_if_lost(event)
        raise Unavailable("the job's events broke off")

    async def stream(self, run: Run) -> AsyncIterator[ServerSentEvent]:
        partials = Partials(self.body.partial_images)
        try:
            async for _, event in run:
                raise_if_lost(event)
                if isinstance(event, Preview) and (number := partials.take(event)) is not None:
                    yield self._partial(run, event, number)
                if isinstance(event, Completed):
                    for index in range(self.generation.n):
                        yield await self._completed(run, event.report, index)
        except PatchforgeError as error:
            yield _sse({"type": "error", "error": Problem.of(error).openai_error()})

    async def _response(self, run: Run, report: SavingsReport) -> dict[str, Any]:
        return {
            "created": int(time.time()),
            "data": [await self._datum(run, index) for index in range(self.generation.n)],
            "output_format": self.generation.output_format,
            "usage": self._usage(report, report.patch_evaluations),
            "patchforge": {"job_id": run.job.id, "report": report.model_dump(mode="json")},
            **self._look(run),
        }

    async def _datum(self, run: Run, index: int) -> dict[str, str]:
        if self.body.response_format == "url":
            return {"url": self.caller.url_of(run.job.id, index)}
        return {"b64_json": await self._picture(run, index)}

    def _partial(self, run: Run, preview: Preview, number: int) -> ServerSentEvent:
        event = {
            "type": f"{self.kind}.partial_image",
            "b64_json": preview.b64_png,
            "partial_image_index": number,
            "created_at": int(time.time()),
            "output_format": "png",  # whatever the finished picture will be
            "patchforge": {"job_id": run.job.id, "image_index": preview.index},
        }
        return _sse(event | self._look(run))

    async def _completed(self, run: Run, report: SavingsReport, index: int) -> ServerSentEvent:
        event = {
            "type": f"{self.kind}.completed",
            "b64_json": await self._picture(run, index),
            "created_at": int(time.time()),
            "output_format": self.generation.output_format,
            "usage": self._usage(report, report.images[index].patch_evaluations),
            "patchforge": {"job_id": run.job.id, "image_index": index, "report": report.model_dump(mode="json")},
        }
        return _sse(event | self._look(run))

    def _look(self, run: Run) -> dict[str, Any]:
        """What OpenAI repeats of a request in each answer."""
        request = run.job.request
        look = {
            "size": f"{request.width or self.card.width}x{request.height or self.card.height}",
            "quality": LEVELS[self.generation.quality] if self.generation.quality else "auto",
            "background": "opaque",
        }
        return look | ({"safety_identifier": self.body.caller} if self.body.caller else {})

    async def _picture(self, run: Run, index: int) -> str:
        return b64encode(await self.service.image(run.job, index)).decode("ascii")

    def _usage(self, report: SavingsReport, patch_evaluations: int) -> dict[str, Any]:
        """Tokens, as far as there is a likeness: of a prompt, its tokens; of a picture sent, its patches, looked at
        once; of those made, patch evaluations.
        """
        text = report.prompt_tokens
        image = report.patches if self.generation.image is not None else 0
        return {
            "input_tokens": text + image,
            "input_tokens_details": {"text_tokens": text, "image_tokens": image},
            "output_tokens": patch_evaluations,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": patch_evaluations},
            "total_tokens": text + image + patch_evaluations,
        }


class Partials:
    """Chooses which previews to pass on: ``wanted`` of each picture, spread evenly over its evaluations."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._taken: dict[int, int] = {}

    def take(self, preview: Preview) -> int | None:
        """The number of this partial image, or None to pass it over."""
        number = self._taken.get(preview.index, 0)
        due = preview.evaluation * (self.wanted + 1) >= preview.evaluations * (number + 1)
        if number == self.wanted or not due:
            return None
        self._taken[preview.index] = number + 1
        return number


def _sse(event: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(event), event=event["type"], sep="\n")

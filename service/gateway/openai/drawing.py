"""One call of the Images API: runs its job and builds the response or the events that OpenAI's clients expect."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sse_starlette import ServerSentEvent

from patchforge.service.errors import PatchforgeError
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.openai.requests import OpenAIRequest
from patchforge.service.gateway.problems import Problem
from patchforge.service.gateway.runs import Run
from patchforge.service.messages.endings import raise_if_lost
from patchforge.service.messages.events import Completed, Preview
from patchforge.service.messages.partials import PartialImages
from patchforge.service.messages.samplers import Quality
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard, SavingsReport

LEVELS = {Quality.DRAFT: "low", Quality.STANDARD: "medium", Quality.HIGH: "high"}
"""OpenAI's names of our presets."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call, and how to build links for it."""

    tenant: str | None
    idempotency_key: str | None
    url_of: Callable[[str, int], str]
    """Makes the URL of a job's picture at this gateway from the job's id and the picture's index."""


class Drawing:
    """One call. `kind` begins its events' names: `image_generation` or `image_edit`."""

    def __init__(self, service: JobService, caller: Caller, card: ModelCard, body: OpenAIRequest, kind: str) -> None:
        self.service = service
        self.caller = caller
        self.card = card
        self.body = body
        self.kind = kind
        self.generation = body.generation(card)

    async def begin(self, *, quiet: bool = False) -> Run:
        """Queues the job. `quiet`: the caller will only wait for `completed`."""
        caller = self.caller
        return await self.service.run(self.generation, caller.tenant, caller.idempotency_key, quiet=quiet)

    async def complete(self) -> dict[str, Any]:
        async with await self.begin(quiet=True) as run:
            ended = await run.completed(pictures=self.body.response_format != "url")
            return await self._build_response(run, ended.report)

    async def stream(self, run: Run) -> AsyncIterator[ServerSentEvent]:
        partials = PartialImages(self.body.partial_images or 0)
        try:
            async for _, event in run:
                raise_if_lost(event)
                if isinstance(event, Preview):
                    number = partials.take(event.index, event.evaluation, event.evaluations)
                    if number is not None:
                        yield self._build_partial(run, event.index, number, event.b64_png)
                if isinstance(event, Completed):
                    pictures = [await self._fetch_base64(run, index) for index in range(self.generation.n)]
                    for index, picture in enumerate(pictures):
                        for number in partials.missing(index):  # finished sooner than it might have been
                            yield self._build_partial(run, index, number, picture, self.generation.output_format)
                    for index, picture in enumerate(pictures):
                        yield self._build_completed(run, event.report, index, picture)
        except PatchforgeError as error:
            yield _encode_event({"type": "error", "error": Problem.of(error).openai_error()})

    async def _build_response(self, run: Run, report: SavingsReport) -> dict[str, Any]:
        links = {} if self.body.response_format == "b64_json" else await self.service.picture_links(run.job)
        images = await asyncio.gather(*(self._build_image(run, index, links) for index in range(self.generation.n)))
        return build_response(run.job, report, images, int(time.time())) | self._repeat_options(run)

    async def _build_image(self, run: Run, index: int, links: Mapping[int, str]) -> dict[str, str]:
        """In both forms unless one was chosen: some clients know only one, and OpenAI's default differs by model."""
        image = {}
        if self.body.response_format != "url":
            image["b64_json"] = await self._fetch_base64(run, index)
        if self.body.response_format != "b64_json":
            image["url"] = links.get(index) or self.caller.url_of(run.job.id, index)
        return image

    def _build_partial(
        self, run: Run, index: int, number: int, picture: str, output_format: str = "png"
    ) -> ServerSentEvent:
        """`picture` is in base64; previews are PNG, whatever the finished picture will be."""
        event = {
            "type": f"{self.kind}.partial_image",
            "b64_json": picture,
            "partial_image_index": number,
            "created_at": int(time.time()),
            "output_format": output_format,
            "patchforge": {"job_id": run.job.id, "image_index": index},
        }
        return _encode_event(event | self._repeat_options(run))

    def _build_completed(self, run: Run, report: SavingsReport, index: int, picture: str) -> ServerSentEvent:
        event = {
            "type": f"{self.kind}.completed",
            "b64_json": picture,
            "created_at": int(time.time()),
            "output_format": self.generation.output_format,
            "usage": count_usage(self.generation, report, report.images[index].patch_evaluations),
            "patchforge": {"job_id": run.job.id, "image_index": index, "report": report.model_dump(mode="json")},
        }
        return _encode_event(event | self._repeat_options(run))

    def _repeat_options(self, run: Run) -> dict[str, Any]:
        return repeat_options(run.job.request, self.body, self.card)

    async def _fetch_base64(self, run: Run, index: int) -> str:
        return b64encode(await run.image(index)).decode("ascii")


def build_response(job: Job, report: SavingsReport, images: list[dict[str, str]], created: int) -> dict[str, Any]:
    """OpenAI's answer with the pictures of a completed job, without the options that it repeats."""
    return {
        "created": created,
        "data": images,
        "output_format": job.request.output_format,
        "usage": count_usage(job.request, report, report.patch_evaluations),
        "patchforge": {"job_id": job.id, "report": report.model_dump(mode="json")},
    }


def repeat_options(filled: GenerationRequest, body: OpenAIRequest, card: ModelCard) -> dict[str, Any]:
    """The options of a request that OpenAI repeats in each response. `filled` is what `body` became."""
    options = {
        "size": f"{filled.width or card.width}x{filled.height or card.height}",
        "quality": LEVELS[body.quality] if body.quality else "auto",
        "background": "opaque",
    }
    return options | ({"safety_identifier": body.caller} if body.caller else {})


def count_usage(request: GenerationRequest, report: SavingsReport, patch_evaluations: int) -> dict[str, Any]:
    """Fills OpenAI's token counts: the prompt's tokens, the patches of a picture sent, and evaluations as output."""
    text = report.prompt_tokens
    image = report.patches if request.image is not None else 0
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": patch_evaluations,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": patch_evaluations},
        "total_tokens": text + image + patch_evaluations,
    }


def _encode_event(event: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(event), event=event["type"], sep="\n")

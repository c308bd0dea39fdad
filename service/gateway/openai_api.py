"""OpenAI's Images and Models APIs, usable from the official client unchanged."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from sse_starlette import ServerSentEvent
from starlette.responses import JSONResponse, Response

from service.errors import InvalidRequest, JobFailed, PatchforgeError, Unavailable
from service.gateway.body import json_body, json_body_schema
from service.gateway.dependencies import Knobs, Service, Tenant
from service.gateway.images_request import ImagesRequest
from service.gateway.jobs import JobService, Run
from service.gateway.problems import Problem
from service.gateway.streams import EventStream, unless_gone
from service.schemas import Cancelled, Completed, Event, Expired, Failed, ModelCard, Preview, SavingsReport

router = APIRouter(tags=["openai"])


@router.get("/v1/models")
async def list_models(service: Service) -> dict[str, Any]:
    """The models that live workers serve; sizes, classes and defaults are under `patchforge`."""
    return {"object": "list", "data": [_model(card) for card in await service.queue.models()]}


@router.get("/v1/models/{name}")
async def get_model(service: Service, name: str) -> dict[str, Any]:
    """One of them."""
    return _model(await service.model(name))


@router.post("/v1/images/generations", openapi_extra=json_body_schema(ImagesRequest))
async def generate_images(
    request: Request,
    service: Service,
    tenant: Tenant,
    settings: Knobs,
    body: Annotated[ImagesRequest, Depends(json_body(ImagesRequest))],
) -> Response:
    """Draw `n` pictures, at once or (`stream`) with partial ones on the way. Hanging up cancels the job.

    In `usage`, output tokens are patch evaluations done and input tokens the words of the prompt; what was saved is
    under `patchforge.report`.
    """
    card = await service.model(body.model)
    drawing = Drawing(service, tenant, card, body)
    if body.stream:
        run = await drawing.begin()
        return EventStream(drawing.stream(run), run, settings)
    return JSONResponse(await unless_gone(request, drawing.complete()))


class Drawing:
    """One call of the Images API."""

    def __init__(self, service: JobService, tenant: str | None, card: ModelCard, body: ImagesRequest) -> None:
        self.service = service
        self.tenant = tenant
        self.body = body
        self.size = f"{card.width}x{card.height}"
        if body.size not in ("auto", self.size):
            raise InvalidRequest(f"{card.name} draws {self.size} only", field="size")
        self.generation = body.generation(card)

    async def begin(self) -> Run:
        return await self.service.run(self.generation, self.tenant)

    async def complete(self) -> dict[str, Any]:
        async with await self.begin() as run:
            async for _, event in run:
                if isinstance(event, Completed):
                    return await self._response(run, event.report)
                _raise_if_lost(event)
        raise Unavailable("the job's events broke off")

    async def stream(self, run: Run) -> AsyncIterator[ServerSentEvent]:
        partials = Partials(self.body.partial_images)
        try:
            async for _, event in run:
                _raise_if_lost(event)
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
            "data": [{"b64_json": await self._picture(run, index)} for index in range(self.generation.n)],
            "background": "opaque",
            "output_format": self.generation.output_format,
            "size": self.size,
            "usage": self._usage(report.patch_evaluations),
            "patchforge": {"job_id": run.job.id, "report": report.model_dump(mode="json")},
        }

    def _partial(self, run: Run, preview: Preview, number: int) -> ServerSentEvent:
        event = {
            "type": "image_generation.partial_image",
            "b64_json": preview.b64_png,
            "partial_image_index": number,
            "output_format": "png",  # whatever the finished picture will be
            "patchforge": {"job_id": run.job.id, "image_index": preview.index},
        }
        return _sse(event | self._look())

    async def _completed(self, run: Run, report: SavingsReport, index: int) -> ServerSentEvent:
        event = {
            "type": "image_generation.completed",
            "b64_json": await self._picture(run, index),
            "output_format": self.generation.output_format,
            "usage": self._usage(report.images[index].patch_evaluations),
            "patchforge": {"job_id": run.job.id, "image_index": index, "report": report.model_dump(mode="json")},
        }
        return _sse(event | self._look())

    def _look(self) -> dict[str, Any]:
        return {"created_at": int(time.time()), "size": self.size, "quality": "auto", "background": "opaque"}

    async def _picture(self, run: Run, index: int) -> str:
        return b64encode(await self.service.image(run.job, index)).decode("ascii")

    def _usage(self, patch_evaluations: int) -> dict[str, Any]:
        words = len((self.generation.prompt or "").split())
        return {
            "input_tokens": words,
            "input_tokens_details": {"text_tokens": words, "image_tokens": 0},
            "output_tokens": patch_evaluations,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": patch_evaluations},
            "total_tokens": words + patch_evaluations,
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


def _raise_if_lost(event: Event) -> None:
    if isinstance(event, Failed):
        failure = JobFailed(event.error.message)
        failure.code = event.error.code
        raise failure
    if isinstance(event, Cancelled):
        raise JobFailed("the job was cancelled")
    if isinstance(event, Expired):
        raise JobFailed("no worker was free before the deadline")


def _sse(event: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(event), event=event["type"], sep="\n")


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "patchforge",
        "patchforge": card.model_dump(mode="json"),
    }

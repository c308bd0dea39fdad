"""OpenAI's Images and Models APIs, usable from the official client unchanged."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import JSONResponse, Response

from service.gateway.answers import BODY, SERVER_SENT_EVENT, openai_errors, success
from service.gateway.body import json_body, json_body_schema
from service.gateway.dependencies import Knobs, Service, Tenant
from service.gateway.drawing import Caller, Drawing
from service.gateway.images_request import EditRequest, ImagesRequest
from service.gateway.multipart import form_body, form_body_schema
from service.gateway.streams import EventStream, unless_gone
from service.sampler_options import Quality, preset
from service.schemas import ModelCard
from service.settings import Settings

router = APIRouter(tags=["openai"], responses=openai_errors(401, 413, 500, 503))
uploads = APIRouter(tags=["openai"], responses=openai_errors(401, 413, 500, 503))
"""Calls whose bodies carry pictures."""

DRAWN = success("application/json", "The pictures; or, with `stream`, events.", {"type": "object"})
DRAWN[200]["content"]["text/event-stream"] = {"schema": SERVER_SENT_EVENT}
ANSWERS = DRAWN | openai_errors(400, 404, 409, 429, 504, *BODY)


def _caller(
    request: Request,
    tenant: Tenant,
    idempotency_key: Annotated[str | None, Header(description="Repeat it, and the same job answers.")] = None,
) -> Caller:
    def url_of(job_id: str, index: int) -> str:
        return str(request.url_for("get_image", job_id=job_id).include_query_params(index=index))

    return Caller(tenant, idempotency_key, url_of)


@router.get("/v1/models")
async def list_models(service: Service) -> dict[str, Any]:
    """The models that live workers serve; sizes, classes and defaults are under `patchforge`."""
    return {"object": "list", "data": [_model(card) for card in await service.queue.models()]}


@router.get("/v1/models/{name}", responses=openai_errors(404))
async def get_model(service: Service, name: str) -> dict[str, Any]:
    """One of them."""
    return _model(await service.model(name))


@router.post(
    "/v1/images/generations",
    openapi_extra=json_body_schema(ImagesRequest),
    response_class=JSONResponse,
    responses=ANSWERS,
)
async def generate_images(
    request: Request,
    service: Service,
    caller: Annotated[Caller, Depends(_caller)],
    settings: Knobs,
    body: Annotated[ImagesRequest, Depends(json_body(ImagesRequest))],
) -> Response:
    """Draw `n` pictures, at once or (`stream`) with partial ones on the way.

    Hanging up cancels the job, unless an `Idempotency-Key` was given: repeat the call with it, and that job answers.
    In `usage`, output tokens are patch evaluations done and input tokens those of the prompt; what was saved is under
    `patchforge.report`.
    """
    drawing = Drawing(service, caller, await service.model(body.model), body, "image_generation")
    return await _answer(request, settings, drawing)


@uploads.post(
    "/v1/images/edits", openapi_extra=form_body_schema(EditRequest), response_class=JSONResponse, responses=ANSWERS
)
async def edit_image(
    request: Request,
    service: Service,
    caller: Annotated[Caller, Depends(_caller)],
    settings: Knobs,
    body: Annotated[EditRequest, Depends(form_body(EditRequest))],
) -> Response:
    """Draw over a picture: where `mask` is fully transparent or, without one, everywhere, as far as `strength` goes.

    Patches of which the mask keeps every pixel are known from the start: they are evaluated once, for the others to
    see, and no more. What is kept is kept exactly.
    Without a `size` the answer is as large as the picture sent, as far as that is within bounds. In `usage`, the
    picture's patches count as input tokens. All else is as for generations.
    """
    drawing = Drawing(service, caller, await service.model(body.model), body, "image_edit")
    return await _answer(request, settings, drawing)


async def _answer(request: Request, settings: Settings, drawing: Drawing) -> Response:
    if drawing.body.stream:
        run = await drawing.begin()
        return EventStream(drawing.stream(run), run, settings)
    return JSONResponse(await unless_gone(request, drawing.complete()))


def _model(card: ModelCard) -> dict[str, Any]:
    chosen = {quality: preset(quality, card.sampler, card.steps) for quality in Quality}
    presets = {name: {"sampler": sampler.model_dump(), "steps": steps} for name, (sampler, steps) in chosen.items()}
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "patchforge",
        "patchforge": card.model_dump(mode="json") | {"presets": presets},
    }

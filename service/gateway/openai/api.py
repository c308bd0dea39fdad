"""OpenAI's Images and Models APIs. The official client works without changes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import JSONResponse, Response

from patchforge.service.errors import NotFound
from patchforge.service.gateway.answers import BODY, SERVER_SENT_EVENT, openai_errors, success
from patchforge.service.gateway.body import json_body, json_body_schema
from patchforge.service.gateway.dependencies import AppSettings, Service, Tenant
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.openai.drawing import Caller, Drawing
from patchforge.service.gateway.openai.multipart import form_or_json_body, form_or_json_body_schema
from patchforge.service.gateway.openai.requests import (
    STANDINS,
    EditRequest,
    ImagesRequest,
    JsonEditRequest,
    OpenAIRequest,
)
from patchforge.service.gateway.streams import EventStream, cancel_on_disconnect
from patchforge.service.messages.samplers import Quality, preset
from patchforge.service.messages.schemas import ModelCard
from patchforge.service.settings import Settings

router = APIRouter(tags=["openai"], responses=openai_errors(401, 413, 500, 501, 503))
uploads = APIRouter(tags=["openai"], responses=openai_errors(401, 413, 500, 501, 503))
"""Operations whose request bodies may carry pictures: they may be larger."""

DRAWN = success("application/json", "The pictures; with `stream`, server-sent events.", {"type": "object"})
DRAWN[200]["content"]["text/event-stream"] = {"schema": SERVER_SENT_EVENT}
ANSWERS = DRAWN | openai_errors(400, 404, 409, 429, 504, *BODY)


def _caller(
    request: Request,
    tenant: Tenant,
    idempotency_key: Annotated[
        str | None, Header(description="A repeated key answers with the same job instead of a new one.")
    ] = None,
) -> Caller:
    def url_of(job_id: str, index: int) -> str:
        return str(request.url_for("get_image", job_id=job_id).include_query_params(index=index))

    return Caller(tenant, idempotency_key, url_of)


@router.get("/v1/models")
async def list_models(service: Service) -> dict[str, Any]:
    """The models that live workers serve. Requests without a model go to the first that fits.

    `patchforge` has sizes, classes and defaults.
    """
    fleet = await service.fleet()
    return {"object": "list", "data": [_model(card, fleet) for card in fleet.cards]}


@router.get("/v1/models/{name}", responses=openai_errors(404))
async def get_model(service: Service, name: str) -> dict[str, Any]:
    """One model, as in the list."""
    fleet = await service.fleet()
    return _model(fleet.find(name), fleet)


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
    settings: AppSettings,
    body: Annotated[ImagesRequest, Depends(json_body(ImagesRequest))],
) -> Response:
    """Generate `n` pictures. With `stream`, partial pictures come first.

    Disconnecting cancels the job, unless the call had an `Idempotency-Key`: the same call with the same key then
    returns that job's pictures. In `usage`, input tokens are the prompt's tokens and output tokens are patch
    evaluations. `patchforge.report` has the savings.
    """
    drawing = Drawing(service, caller, await choose_model(service, body), body, "image_generation")
    return await _respond(request, settings, drawing)


@uploads.post(
    "/v1/images/edits",
    openapi_extra=form_or_json_body_schema(EditRequest, JsonEditRequest),
    response_class=JSONResponse,
    responses=ANSWERS,
)
async def edit_image(
    request: Request,
    service: Service,
    caller: Annotated[Caller, Depends(_caller)],
    settings: AppSettings,
    body: Annotated[EditRequest, Depends(form_or_json_body(EditRequest, JsonEditRequest))],
) -> Response:
    """Edit a picture: where `mask` is fully transparent, or everywhere without a mask. `strength` says how much.

    All other pixels stay exactly as they are. Patches that the mask keeps entirely are evaluated only once.
    Without `size`, the result has the size of the picture sent, scaled to the limits. In `usage`, the picture's
    patches count as input tokens. Everything else works as for generations.
    """
    drawing = Drawing(service, caller, await choose_model(service, body), body, "image_edit")
    return await _respond(request, settings, drawing)


@uploads.post("/v1/images/variations", include_in_schema=False)
async def vary_image() -> Response:
    """Refuses what the official client still offers, in words that help."""
    raise NotFound("variations are not supported; use /v1/images/edits with a prompt, without a mask")


async def choose_model(service: JobService, body: OpenAIRequest) -> ModelCard:
    """Returns the model that a call means; raises the same errors as `Fleet.choose_for`."""
    fleet = await service.fleet()
    if body.model in STANDINS and body.model not in {card.name for card in fleet.cards}:
        body = body.model_copy(update={"model": None})
    # OpenAI's clients have no field for a class label.
    return fleet.choose_for(body, prompt_may_be_class=True)


async def _respond(request: Request, settings: Settings, drawing: Drawing) -> Response:
    if drawing.body.stream:
        run = await drawing.begin()
        return EventStream(drawing.stream(run), run, settings)
    return JSONResponse(await cancel_on_disconnect(request, drawing.complete()))


def _model(card: ModelCard, fleet: Fleet) -> dict[str, Any]:
    chosen = {quality: preset(quality, card.sampler, card.steps) for quality in Quality}
    presets = {name: {"sampler": sampler.model_dump(), "steps": steps} for name, (sampler, steps) in chosen.items()}
    of_fleet = {"presets": presets, "digests": fleet.digests(card.name), "asleep": card.name in fleet.asleep}
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "patchforge",
        "patchforge": card.model_dump(mode="json") | of_fleet,
    }

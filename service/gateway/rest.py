"""The native REST API: jobs, their events and pictures, and the probes of an operator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from service.events import Event
from service.gateway.answers import BODY, SERVER_SENT_EVENT, Answers, problems, success
from service.gateway.body import json_body, json_body_schema
from service.gateway.dependencies import Knobs, Service, Tenant
from service.gateway.streams import EventStream
from service.schemas import MAX_IMAGES, GenerationRequest, Job, OutputFormat

router = APIRouter()
jobs = APIRouter(tags=["jobs"], responses=problems(401, 404, 413, 422, 500, 503))
uploads = APIRouter(tags=["jobs"], responses=problems(401, 404, 413, 422, 500, 503))
"""Calls whose bodies carry pictures."""


@uploads.post(
    "/v1/jobs",
    status_code=202,
    openapi_extra=json_body_schema(GenerationRequest),
    responses=problems(429, *BODY),
)
async def submit_job(
    service: Service,
    tenant: Tenant,
    response: Response,
    generation: Annotated[GenerationRequest, Depends(json_body(GenerationRequest))],
    idempotency_key: Annotated[str | None, Header(description="Repeat it, and the same job is returned.")] = None,
) -> Job:
    """Queue a job that lives on without you."""
    job = await service.submit(generation, tenant, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


PICTURE: Answers = {
    200: {
        "description": "The picture.",
        "headers": {"ETag": {"schema": {"type": "string"}}},
        "content": {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in OutputFormat},
    },
    304: {"description": "It is the one you have (`If-None-Match`)."},
}


@jobs.get("/v1/jobs/{job_id}")
async def get_job(service: Service, tenant: Tenant, job_id: str) -> Job:
    """The state of a job; with its savings report once it has completed."""
    return await service.get(job_id, tenant)


@jobs.delete("/v1/jobs/{job_id}")
async def cancel_job(service: Service, tenant: Tenant, job_id: str) -> Job:
    """Cancel a job; harmless on one that has ended."""
    return await service.cancel(job_id, tenant)


@jobs.get(
    "/v1/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses=success("text/event-stream", "The job's events.", SERVER_SENT_EVENT) | problems(400),
)
async def watch_job(
    service: Service,
    tenant: Tenant,
    settings: Knobs,
    job_id: str,
    last_event_id: Annotated[str | None, Header(description="Only events after this one.")] = None,
) -> EventStream:
    """Follow a job as server-sent events, resumable by `Last-Event-ID`. Leaving does not cancel it."""
    # What can be wrong has to show before the stream begins.
    events = await service.watch(job_id, tenant, last_event_id)
    return EventStream(_framed(events), service.until_drained(), settings)


async def _framed(events: AsyncIterator[tuple[str, Event]]) -> AsyncIterator[ServerSentEvent]:
    async for event_id, event in events:
        yield as_sse(event_id, event)


def as_sse(event_id: str, event: Event) -> ServerSentEvent:
    # In ASCII, for many a client splits lines as its language does, at U+2028 and such too.
    return ServerSentEvent(event.model_dump_json(ensure_ascii=True), event=event.type, id=event_id, sep="\n")


@jobs.get("/v1/jobs/{job_id}/image", response_class=Response, responses=PICTURE | problems(409))
async def get_image(
    service: Service,
    tenant: Tenant,
    settings: Knobs,
    job_id: str,
    index: Annotated[int, Query(ge=0, lt=MAX_IMAGES)] = 0,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A finished picture."""
    job = await service.get(job_id, tenant)
    picture = await service.image(job, index)
    etag = f'"{job_id}-{index}"'
    headers = {"ETag": etag, "Cache-Control": f"private, max-age={settings.result_ttl_seconds}, immutable"}
    if if_none_match == etag:
        return Response(status_code=304, headers=headers)
    return Response(picture, media_type=f"image/{job.request.output_format}", headers=headers)


@router.get("/healthz", tags=["operation"], responses=problems(413))
async def alive() -> dict[str, str]:
    """The process is alive, whatever it depends on."""
    return {"status": "alive"}


@router.get("/readyz", tags=["operation"], responses=problems(413, 503))
async def ready(service: Service) -> dict[str, str | list[str]]:
    """Requests are welcome: the queue answers and some worker serves a model."""
    return {"status": "ready", "models": [card.name for card in await service.ready()]}

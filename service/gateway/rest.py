"""The native REST API: jobs, their events and pictures, and the operator's probes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from patchforge.service.gateway.answers import BODY, SERVER_SENT_EVENT, Answers, problems, success
from patchforge.service.gateway.body import json_body, json_body_schema
from patchforge.service.gateway.dependencies import AppSettings, Service, Tenant
from patchforge.service.gateway.etags import is_known
from patchforge.service.gateway.streams import EventStream
from patchforge.service.messages.events import Event
from patchforge.service.messages.schemas import MAX_IMAGES, GenerationRequest, Job, OutputFormat

router = APIRouter()
jobs = APIRouter(tags=["jobs"], responses=problems(401, 404, 413, 422, 500, 501, 503))
uploads = APIRouter(tags=["jobs"], responses=problems(401, 404, 413, 422, 500, 501, 503))
"""Operations whose request bodies may carry pictures: they may be larger."""


@uploads.post(
    "/v1/jobs",
    status_code=202,
    openapi_extra=json_body_schema(GenerationRequest),
    responses=problems(429, *BODY),
)
async def submit_job(
    request: Request,
    service: Service,
    tenant: Tenant,
    response: Response,
    generation: Annotated[GenerationRequest, Depends(json_body(GenerationRequest))],
    idempotency_key: Annotated[
        str | None, Header(description="A repeated key returns the same job instead of a new one.")
    ] = None,
) -> Job:
    """Queue a job. It continues when you disconnect."""
    job = await service.submit(generation, tenant, idempotency_key)
    response.headers["Location"] = f"{request.scope.get('root_path', '')}/v1/jobs/{job.id}"
    return job


PICTURE: Answers = {
    200: {
        "description": "The picture.",
        "headers": {"ETag": {"schema": {"type": "string"}}},
        "content": {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in OutputFormat},
    },
    304: {"description": "Not modified: the ETag is in `If-None-Match`."},
}


WATCHED: Answers = success("text/event-stream", "The job's events.", SERVER_SENT_EVENT) | {
    204: {"description": "The job has ended, and this was its last event: a browser's EventSource then stops."}
}


@jobs.get("/v1/jobs/{job_id}")
async def get_job(service: Service, tenant: Tenant, job_id: str) -> Job:
    """Get a job's state, and its savings report once it has completed."""
    return await service.get(job_id, tenant)


@jobs.delete("/v1/jobs/{job_id}")
async def cancel_job(service: Service, tenant: Tenant, job_id: str) -> Job:
    """Cancel a job. A job that has ended does not change."""
    return await service.cancel(job_id, tenant)


@jobs.get(
    "/v1/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses=WATCHED | problems(400),
)
async def watch_job(
    service: Service,
    tenant: Tenant,
    settings: AppSettings,
    job_id: str,
    last_event_id: Annotated[str | None, Header(description="Send only the events after this one.")] = None,
) -> Response:
    """Follow a job as server-sent events. Resume with `Last-Event-ID`; disconnecting does not cancel the job."""
    # Errors must be raised before the stream begins: afterwards the status is sent.
    events = await service.watch_rest(job_id, tenant, last_event_id)
    if events is None:
        return Response(status_code=204)
    return EventStream(_encode_events(events), service.until_drained(), settings)


async def _encode_events(events: AsyncIterator[tuple[str, Event]]) -> AsyncIterator[ServerSentEvent]:
    async for event_id, event in events:
        yield as_sse(event_id, event)


def as_sse(event_id: str, event: Event) -> ServerSentEvent:
    # ASCII only: many clients split lines as their language does, also at U+2028.
    return ServerSentEvent(event.model_dump_json(ensure_ascii=True), event=event.type, id=event_id, sep="\n")


@jobs.get("/v1/jobs/{job_id}/image", response_class=Response, responses=PICTURE | problems(409))
async def get_image(
    service: Service,
    tenant: Tenant,
    settings: AppSettings,
    job_id: str,
    index: Annotated[int, Query(ge=0, lt=MAX_IMAGES)] = 0,
    if_none_match: Annotated[list[str] | None, Header()] = None,
) -> Response:
    """Get a finished picture."""
    job = await service.get(job_id, tenant)
    picture = await service.image(job, index)
    etag = f'"{job_id}-{index}"'
    headers = {"ETag": etag, "Cache-Control": f"private, max-age={settings.result_ttl_seconds}, immutable"}
    if is_known(etag, if_none_match or ()):
        return Response(status_code=304, headers=headers)
    return Response(picture, media_type=f"image/{job.request.output_format}", headers=headers)


@router.get("/healthz", tags=["operation"], responses=problems(413))
async def alive() -> dict[str, str]:
    """Liveness: the process runs, even if the queue server or all workers are away."""
    return {"status": "alive"}


@router.get("/readyz", tags=["operation"], responses=problems(413, 503))
async def ready(service: Service) -> dict[str, str | list[str]]:
    """Readiness: the queue server answers and at least one worker serves a model."""
    return {"status": "ready", "models": [card.name for card in (await service.ready()).cards]}

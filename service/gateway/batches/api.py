"""OpenAI's Files and Batch APIs, for requests that can wait. The official client works without changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from patchforge.service.gateway.answers import BODY, openai_errors, success
from patchforge.service.gateway.batches.results import BatchResults
from patchforge.service.gateway.batches.upload import FORM, JSON_LINES, read_upload, upload_schema
from patchforge.service.gateway.body import json_body, media_type
from patchforge.service.gateway.dependencies import AppSettings, Service, Tenant
from patchforge.service.gateway.jobs import check_idempotency_key
from patchforge.service.gateway.validation import validated
from patchforge.service.messages.batches import (
    Batch,
    BatchFile,
    BatchOptions,
    BatchRequest,
    Deleted,
    FileOptions,
)
from patchforge.service.queue import GatewayQueue

router = APIRouter(tags=["batches"], responses=openai_errors(401, 413, 500, 503))
uploads = APIRouter(tags=["batches"], responses=openai_errors(401, 413, 500, 503))
"""Operations whose request bodies are files: they may be larger."""

MOST_LISTED = 100
After = Annotated[str | None, Query(description="Continue after this id.")]
Limit = Annotated[int, Query(ge=1, le=10_000, description=f"At most {MOST_LISTED} come at a time.")]
Order = Annotated[Literal["desc"], Query(description="The newest come first.")]


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[BatchFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


@uploads.post(
    "/v1/files", openapi_extra=upload_schema(FileOptions), responses=openai_errors(400, *BODY), response_model=BatchFile
)
async def send_file(request: Request, service: Service, tenant: Tenant, settings: AppSettings) -> BatchFile:
    """Store a file of requests for batches, one JSON object a line."""
    service.refuse_when_draining()
    upload = await read_upload(request)
    options = validated(FileOptions, upload.fields)
    ttl = settings.batch_ttl_seconds
    if options.expires_after is not None:
        ttl = min(ttl, options.expires_after.seconds)
    return await service.queue.add_file(upload.lines, upload.filename, tenant, ttl)


@router.get("/v1/files", responses=openai_errors(400, 404))
async def list_files(
    service: Service,
    tenant: Tenant,
    after: After = None,
    limit: Limit = MOST_LISTED,
    order: Order = "desc",
    purpose: Literal["batch", "batch_output"] | None = None,
) -> FileList:
    """List the files that you sent, and the results of batches."""
    files, more = await service.queue.files(tenant, after, min(limit, MOST_LISTED))
    last = files[-1].id if files else None
    chosen = [file for file in files if purpose in (None, file.purpose)]
    return FileList(data=chosen, first_id=chosen[0].id if chosen else None, last_id=last, has_more=more)


@router.get("/v1/files/{file_id}", responses=openai_errors(404))
async def get_file(service: Service, tenant: Tenant, file_id: str) -> BatchFile:
    """Get what is known of a file."""
    return (await service.queue.file(file_id, tenant)).file


@router.delete("/v1/files/{file_id}", responses=openai_errors(404))
async def delete_file(service: Service, tenant: Tenant, file_id: str) -> Deleted:
    """Delete a file. With the output of a batch, its pictures go too. A batch that has begun goes on."""
    await service.queue.delete_file(file_id, tenant)
    return Deleted(id=file_id, object="file")


@router.get(
    "/v1/files/{file_id}/content",
    response_class=StreamingResponse,
    responses=success(JSON_LINES[0], "One JSON object a line.") | openai_errors(404),
)
async def get_file_content(request: Request, service: Service, tenant: Tenant, file_id: str) -> StreamingResponse:
    """Get the lines of a file: those that you sent, or the results of a batch."""
    stored = await service.queue.file(file_id, tenant)
    if stored.results_of is None:
        content = _joined(service.queue, file_id)
    else:
        batch = await service.queue.batch(stored.results_of, tenant)

        def url_of(job_id: str, index: int) -> str:
            return str(request.url_for("get_image", job_id=job_id).include_query_params(index=index))

        results = BatchResults(service.queue, batch, url_of)
        content = results.output() if stored.kind == "output" else results.errors()
    # So an object store that is away, or a file that is gone, is an answer of its own and not a broken stream.
    first = await anext(content, None)
    return StreamingResponse(_resumed(first, content), media_type=JSON_LINES[0])


async def _resumed(first: bytes | None, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first is not None:
        yield first
        async for each in rest:
            yield each


async def _joined(queue: GatewayQueue, file_id: str) -> AsyncIterator[bytes]:
    first = True
    async for line in queue.file_lines(file_id):
        yield line if first else b"\n" + line
        first = False


@uploads.post(
    "/v1/batches",
    openapi_extra=upload_schema(BatchOptions, also_json=BatchRequest),
    responses=openai_errors(400, 404, 429, *BODY),
)
async def create_batch(
    request: Request,
    service: Service,
    tenant: Tenant,
    settings: AppSettings,
    idempotency_key: Annotated[
        str | None, Header(description="A repeated key answers with the same batch instead of a new one.")
    ] = None,
) -> Batch:
    """Begin a batch: of a file that you sent before, or of the file in this body.

    Its requests are drawn at low priority, with a few at a time in the queue. Lines that are wrong end in the error
    file, each with its reason; the others are drawn.
    """
    service.refuse_when_draining()
    check_idempotency_key(idempotency_key)
    queue = service.queue
    if media_type(request) in (FORM, *JSON_LINES):
        upload = await read_upload(request)
        options = validated(BatchOptions, upload.fields)
        digest = sha256(b"\n".join(upload.lines)).hexdigest()
        fingerprint = f"{options.model_dump_json()}{digest}"
    else:
        upload, body = None, await json_body(BatchRequest)(request)
        options, fingerprint = body, body.model_dump_json()
    if idempotency_key is not None:
        known = await queue.batch_of_key(idempotency_key, fingerprint, tenant)
        if known is not None:
            return known
    if upload is None:
        file_id = body.input_file_id
    else:
        file_id = (await queue.add_file(upload.lines, upload.filename, tenant, settings.batch_ttl_seconds)).id
    return await queue.create_batch(
        file_id,
        tenant,
        endpoint=options.endpoint,
        window=options.completion_window,
        metadata=options.metadata,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
    )


@router.get("/v1/batches", responses=openai_errors(400, 404))
async def list_batches(service: Service, tenant: Tenant, after: After = None, limit: Limit = 20) -> BatchList:
    """List your batches, the newest first."""
    batches, more = await service.queue.batches(tenant, after, min(limit, MOST_LISTED))
    return BatchList(
        data=batches,
        first_id=batches[0].id if batches else None,
        last_id=batches[-1].id if batches else None,
        has_more=more,
    )


@router.get("/v1/batches/{batch_id}", responses=openai_errors(404))
async def get_batch(service: Service, tenant: Tenant, batch_id: str) -> Batch:
    """Get a batch's state. Once it has ended, it names the files with its results."""
    return (await service.queue.batch(batch_id, tenant)).batch


@router.post("/v1/batches/{batch_id}/cancel", responses=openai_errors(404))
async def cancel_batch(service: Service, tenant: Tenant, batch_id: str) -> Batch:
    """Cancel a batch. What is finished stays in its results. A batch that has ended does not change."""
    return await service.queue.cancel_batch(batch_id, tenant)


@router.delete("/v1/batches/{batch_id}", responses=openai_errors(404, 409))
async def delete_batch(service: Service, tenant: Tenant, batch_id: str) -> Deleted:
    """Delete a batch that has ended, with its results and pictures."""
    await service.queue.delete_batch(batch_id, tenant)
    return Deleted(id=batch_id, object="batch")

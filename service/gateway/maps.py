"""Maps of a finished picture's patches as small PNGs: when each was finished, and how difficult it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from io import BytesIO
from typing import Annotated

from fastapi import APIRouter, Query, Response
from PIL import Image

from service.errors import NotFound, NotReady
from service.gateway.answers import problems, success
from service.gateway.dependencies import Knobs, Service, Tenant
from service.schemas import MAX_IMAGES, ImageReport

router = APIRouter(tags=["jobs"], responses=problems(401, 404, 409, 413, 422, 500, 503))

SIDE = 256
"""Pixels of the longer side, at most; a patch is a square of whole pixels."""
ANCHORS = ((13, 8, 60), (48, 80, 150), (32, 145, 140), (120, 200, 90), (253, 231, 60))
"""From early or easy to late or hard; evenly spaced."""


class PatchMap(StrEnum):
    """What a map shows."""

    FINISH = "finish"
    DIFFICULTY = "difficulty"


@router.get(
    "/v1/jobs/{job_id}/maps/{kind}.png",
    response_class=Response,
    responses=success("image/png", "One square a patch; the brighter, the later or the harder.", {"type": "string"}),
)
async def get_map(
    service: Service,
    tenant: Tenant,
    settings: Knobs,
    job_id: str,
    kind: PatchMap,
    index: Annotated[int, Query(ge=0, lt=MAX_IMAGES)] = 0,
) -> Response:
    """The evaluation after which each patch of a picture was finished, or its last predicted variance."""
    job = await service.get(job_id, tenant)
    if job.report is None:
        raise NotReady(f"the job is {job.status}: maps come with the report")
    if index >= len(job.report.images):
        raise NotFound(f"the job has {len(job.report.images)} pictures")
    levels = finish_levels if kind is PatchMap.FINISH else difficulty_levels
    picture = draw(levels(job.report.images[index]), job.report.grid_columns)
    headers = {"Cache-Control": f"private, max-age={settings.result_ttl_seconds}, immutable"}
    return Response(picture, media_type="image/png", headers=headers)


def finish_levels(report: ImageReport) -> list[float]:
    """From 0 at the first evaluation to 1 at the last."""
    last = max(report.finished_at)
    return [evaluation / last if last else 0.0 for evaluation in report.finished_at]


def difficulty_levels(report: ImageReport) -> list[float]:
    """Standard deviation in log scale, from the easiest patch of the picture to its hardest."""
    logs = [math.log(max(variance, 1e-12)) for variance in report.difficulty]
    least, most = min(logs), max(logs)
    return [(each - least) / (most - least) if most > least else 0.0 for each in logs]


def draw(levels: Sequence[float], columns: int) -> bytes:
    """PNG of row-major ``levels`` from 0 to 1."""
    size = columns, len(levels) // columns
    picture = Image.frombytes("P", size, bytes(round(255 * level) for level in levels))
    picture.putpalette([value for step in range(256) for value in colour(step / 255)])
    scale = max(1, SIDE // max(size))
    buffer = BytesIO()
    picture.resize((size[0] * scale, size[1] * scale), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def colour(level: float) -> list[int]:
    """RGB of a level, between the two nearest anchors."""
    place = level * (len(ANCHORS) - 1)
    below = min(int(place), len(ANCHORS) - 2)
    return [round(a + (b - a) * (place - below)) for a, b in zip(ANCHORS[below], ANCHORS[below + 1], strict=True)]

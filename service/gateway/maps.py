"""Maps of a finished picture as small PNGs: when each patch was finished, or how difficult it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from io import BytesIO
from typing import Annotated

from fastapi import APIRouter, Query, Response
from PIL import Image

from patchforge.service.errors import NotFound, NotReady
from patchforge.service.gateway.answers import problems, success
from patchforge.service.gateway.dependencies import AppSettings, Service, Tenant
from patchforge.service.messages.schemas import MAX_IMAGES, ImageReport

router = APIRouter(tags=["jobs"], responses=problems(401, 404, 409, 413, 422, 500, 501, 503))

SIDE = 256
"""Most pixels of the longer side. Each patch is a square of whole pixels."""
ANCHORS = ((13, 8, 60), (48, 80, 150), (32, 145, 140), (120, 200, 90), (253, 231, 60))
"""RGB colours at even distances, from early or easy to late or hard."""


class PatchMap(StrEnum):
    """What a map shows: when patches finished, or their difficulty."""

    FINISH = "finish"
    DIFFICULTY = "difficulty"


@router.get(
    "/v1/jobs/{job_id}/maps/{kind}.png",
    response_class=Response,
    responses=success("image/png", "One square per patch: the brighter, the later or the harder.", {"type": "string"}),
)
async def get_map(
    service: Service,
    tenant: Tenant,
    settings: AppSettings,
    job_id: str,
    kind: PatchMap,
    index: Annotated[int, Query(ge=0, lt=MAX_IMAGES)] = 0,
) -> Response:
    """A map of a finished picture: the evaluation that finished each patch, or its last predicted variance."""
    job = await service.get(job_id, tenant)
    if job.report is None:
        raise NotReady(f"the job is {job.status}: only completed jobs have maps")
    if index >= len(job.report.images):
        raise NotFound(f"no picture {index}: the job has {len(job.report.images)}, counted from 0")
    levels = finish_levels if kind is PatchMap.FINISH else difficulty_levels
    picture = draw_map(levels(job.report.images[index]), job.report.grid_columns)
    headers = {"Cache-Control": f"private, max-age={settings.result_ttl_seconds}, immutable"}
    return Response(picture, media_type="image/png", headers=headers)


def finish_levels(report: ImageReport) -> list[float]:
    """When each patch finished: 0 is the first evaluation, 1 the last."""
    last = max(report.finished_at)
    return [evaluation / last if last else 0.0 for evaluation in report.finished_at]


def difficulty_levels(report: ImageReport) -> list[float]:
    """Each patch's predicted variance on a log scale: 0 is the picture's easiest patch, 1 its hardest."""
    logs = [math.log(max(variance, 1e-12)) for variance in report.difficulty]
    least, most = min(logs), max(logs)
    return [(each - least) / (most - least) if most > least else 0.0 for each in logs]


def draw_map(levels: Sequence[float], columns: int) -> bytes:
    """Draws row-major `levels`, each 0 to 1, as a PNG with one square per level."""
    size = columns, len(levels) // columns
    picture = Image.frombytes("P", size, bytes(round(255 * level) for level in levels))
    picture.putpalette([value for step in range(256) for value in colour(step / 255)])
    scale = max(1, SIDE // max(size))
    buffer = BytesIO()
    picture.resize((size[0] * scale, size[1] * scale), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def colour(level: float) -> list[int]:
    """RGB of a level, 0 to 1, interpolated between the two nearest anchors."""
    place = level * (len(ANCHORS) - 1)
    below = min(int(place), len(ANCHORS) - 2)
    return [round(a + (b - a) * (place - below)) for a, b in zip(ANCHORS[below], ANCHORS[below + 1], strict=True)]

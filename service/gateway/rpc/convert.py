"""Converts between gRPC messages and our own. No other module knows both."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.validation import validated
from patchforge.service.messages.events import Completed, Event, Failed, ImageReady, PatchesFinished, Preview, Started
from patchforge.service.messages.samplers import Adaptive, DualLoop, Heun, LookAhead, Multistep, Sampler
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb

PICTURES = {"image", "mask"}
ENUM_FIELDS = {"fit": pb.Fit, "output_format": pb.OutputFormat, "priority": pb.Priority, "quality": pb.Quality}


def generation_from_proto(message: pb.Generation) -> GenerationRequest:
    """Validates a gRPC request.

    Raises:
        InvalidRequest: `field` names the first field that is not valid.
    """
    fields: dict[str, Any] = {descriptor.name: value for descriptor, value in message.ListFields()}
    sampler = message.WhichOneof("sampler")
    if sampler is not None:
        given = fields.pop(sampler).ListFields()
        fields["sampler"] = {"name": sampler, **{descriptor.name: value for descriptor, value in given}}
    for name, enum in ENUM_FIELDS.items():
        if name in fields:
            fields[name] = _enum_word(enum, fields[name], name)
    for name in ("model", "model_digest"):
        if not fields.get(name):
            fields.pop(name, None)  # many clients send an empty string for a field that is not set
    if "path" in fields:
        fields["path"] = [
            {"evaluation": change.evaluation, "steps": change.steps, "guided": change.guided}
            | ({"tolerance": change.tolerance} if change.HasField("tolerance") else {})
            for change in message.path
        ]
    for name in PICTURES & fields.keys():
        fields[name] = b64encode(fields[name]).decode("ascii")
    return validated(GenerationRequest, fields)


def generation_to_proto(request: GenerationRequest) -> pb.Generation:
    apart = {"sampler", *ENUM_FIELDS, *PICTURES}
    fields = request.model_dump(exclude_none=True, exclude=apart)
    return pb.Generation(
        **fields,
        **_sampler(request.sampler),
        fit=f"FIT_{request.fit.upper() if request.fit else 'UNSPECIFIED'}",
        quality=f"QUALITY_{request.quality.upper() if request.quality else 'UNSPECIFIED'}",
        output_format=f"OUTPUT_FORMAT_{request.output_format.upper()}",
        priority=f"PRIORITY_{request.priority.upper()}",
    )


def job_to_proto(job: Job) -> pb.Job:
    fields = job.model_dump(exclude_none=True, exclude={"request", "status"})
    return pb.Job(
        **fields,
        generation=generation_to_proto(job.request),
        status=f"JOB_STATUS_{job.status.upper()}",
    )


def event_to_proto(event_id: str, event: Event) -> pb.Event:
    message = pb.Event(id=event_id)
    match event:
        case Preview():
            fields = event.model_dump(exclude={"type", "b64_png", "grid"}) | _grid(event.grid)
            message.preview.CopyFrom(pb.PreviewEvent(**fields, png=b64decode(event.b64_png)))
        case PatchesFinished():
            fields = event.model_dump(exclude={"type", "grid"}) | _grid(event.grid)
            message.patches.CopyFrom(pb.PatchesEvent(**fields))
        case Started():
            message.started.CopyFrom(pb.StartedEvent(attempt=event.attempt, steps=event.steps))
        case ImageReady():
            message.image.index = event.index
            message.image.SetInParent()
        case Completed():
            message.completed.CopyFrom(pb.CompletedEvent(report=event.report.model_dump(exclude_none=True)))
        case Failed():
            message.failed.CopyFrom(pb.FailedEvent(error=event.error.model_dump()))
        case _:  # queued, cancelled, expired: events without fields
            getattr(message, event.type).SetInParent()
    return message


def model_to_proto(card: ModelCard) -> pb.Model:
    return pb.Model(
        **card.model_dump(exclude={"kind", "grid", "sampler", "sizes"}),
        **_sampler(card.sampler),
        **_grid(card.grid),
        kind=f"MODEL_KIND_{card.kind.upper()}",
        sizes=[pb.PictureSize(width=width, height=height) for width, height in card.sizes],
    )


def _grid(grid: Sequence[int] | None) -> dict[str, Any]:
    """The keyword arguments that set a grid; 0 rows and columns if it is left out."""
    rows, columns = grid or (0, 0)
    return {"grid_rows": rows, "grid_columns": columns}


def _sampler(sampler: Sampler | None) -> dict[str, Any]:
    """The keyword argument that sets the sampler oneof."""
    match sampler:
        case None:
            return {}
        case Adaptive():
            return {"adaptive": pb.AdaptiveSampler(**sampler.model_dump(exclude={"name"}))}
        case Heun():
            return {"heun": pb.HeunSampler()}
        case DualLoop():
            return {"dual_loop": pb.DualLoopSampler(**sampler.model_dump(exclude={"name"}))}
        case LookAhead():
            return {"look_ahead": pb.LookAheadSampler(**sampler.model_dump(exclude={"name"}))}
        case Multistep():
            return {"multistep": pb.MultistepSampler(**sampler.model_dump(exclude={"name"}))}
        case _:
            return {"euler": pb.EulerSampler()}


def _enum_word(enum: Any, number: int, field: str) -> str:
    if number not in enum.values():
        raise InvalidRequest("is not a known value", field=field)
    prefix = f"{field.upper()}_"
    word: str = enum.Name(number)
    return word.removeprefix(prefix).lower()

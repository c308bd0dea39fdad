"""How much of the queue server's memory a job may come to hold: reserved when the job is accepted."""

from __future__ import annotations

from patchforge.service.messages.fit import nearest_native
from patchforge.service.messages.reading import written
from patchforge.service.messages.samplers import DualLoop, Heun, LookAhead
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, OutputFormat
from patchforge.service.messages.source import Source

PREVIEWS_BYTES = 1 << 20
"""Most bytes of all previews of one job that are kept; older ones go."""
RECORD_BYTES = 8192
"""For the keys of a job, and for what its record holds besides the request."""
PICTURE_TEXT_BYTES = 2048
"""In a picture's file, besides its pixels and what the request says."""
REFERENCE_BYTES = 1024
"""Where a picture is in an object store."""
EVENT_BYTES = 512
"""Of an event, besides pictures and lists of patches."""
PATCH_BYTES = 48
"""For each patch of a picture: in the report, which is kept twice, and in the event that it is finished."""
CHANGE_BYTES = 256
"""For each change of a picture's path, in both copies of the report."""
BYTES_PER_PIXEL = {OutputFormat.PNG: 3.02, OutputFormat.WEBP: 1.5, OutputFormat.JPEG: 1.7}
"""More than Pillow makes of noise, the worst case; JPEG up to `JPEG_QUALITY`."""
JPEG_QUALITY, BEST_JPEG = 95, 2.7
STREAM_NODE_BYTES = 4096
"""Redis stores events together up to this size, and frees them only together."""


def preview_limit(pictures: int) -> int:
    """Returns the most bytes of one preview's PNG: the newest four of each of so many pictures can be kept.

    In an event, the PNG is in base64, with some numbers and the times of the patches.
    """
    return PREVIEWS_BYTES // (6 * pictures)


def room_for(
    request: GenerationRequest, card: ModelCard, source: Source | None = None, pictures_elsewhere: bool = False
) -> int:
    """Returns an upper bound, in bytes, of what Redis keeps of a job: its pictures, events, record and source.

    `request`: with all defaults filled in. `pictures_elsewhere`: pictures, also those to edit, are in an object store,
    and Redis has references.
    """
    rows, columns = card.drawn_grid(request)
    evaluations, said = _evaluations(request), len(written(request).encode())
    picture = REFERENCE_BYTES if pictures_elsewhere else _picture_bytes(request, card) + PICTURE_TEXT_BYTES + 4 * said
    told = PATCH_BYTES * rows * columns + (EVENT_BYTES + CHANGE_BYTES) * evaluations
    sent = _source_bytes(source, pictures_elsewhere)
    return RECORD_BYTES + 2 * said + sent + request.n * (picture + told) + _previews_bytes(request, card, evaluations)


def _evaluations(request: GenerationRequest) -> int:
    """Network evaluations of one picture, at most."""
    match request.sampler:
        case Heun() | LookAhead():
            each = 2
        case DualLoop(inner_steps=inner):
            each = inner
        case _:
            each = 1
    return each * (request.steps or 1) + 1


def _source_bytes(source: Source | None, elsewhere: bool) -> int:
    files = [] if source is None else [each for each in (source.image, source.mask) if each is not None]
    return REFERENCE_BYTES * len(files) if elsewhere else sum(map(len, files))


def _picture_bytes(request: GenerationRequest, card: ModelCard) -> int:
    width, height = request.asked_size or card.size
    each = BYTES_PER_PIXEL[request.output_format]
    if request.output_format is OutputFormat.JPEG and request.output_compression > JPEG_QUALITY:
        each = BEST_JPEG
    return int(each * width * height) + height  # a PNG has one byte more in each row


def _previews_bytes(request: GenerationRequest, card: ModelCard, evaluations: int) -> int:
    if not request.previews:
        return 0
    width, height = nearest_native([card.size, *card.sizes], request.asked_size or card.size)
    rows, columns = card.drawn_grid(request)
    png = min(preview_limit(request.n), int(BYTES_PER_PIXEL[OutputFormat.PNG] * width * height) + height)
    each = png * 4 // 3 + 8 * rows * columns + EVENT_BYTES
    made = request.n * evaluations
    # Each other event may keep a node with previews that were deleted.
    return min(each * made, PREVIEWS_BYTES + STREAM_NODE_BYTES * made)

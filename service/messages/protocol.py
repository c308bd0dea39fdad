"""What processes of different versions must know about each other to work together: see docs/operation.md."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from patchforge.service.messages.base import Message
from patchforge.service.messages.fit import Size
from patchforge.service.messages.samplers import SAMPLERS, Adaptive, Sampler
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, OutputFormat

PROTOCOL = 1
"""The protocol number of what this version writes to the queue server.

It stays the same as long as older processes can ignore what is new. It goes up when they would misread it: a process
refuses records with a higher number than its own. Records without a number have protocol 0.
"""

FIRST = frozenset(
    {
        "deterministic",
        "format.jpeg",
        "format.png",
        "format.webp",
        "image",
        "mask",
        "sampler.adaptive",
        "sampler.dual_loop",
        "sampler.euler",
        "sampler.heun",
        "sampler.look_ahead",
        "sampler.multistep",
        "size",
    }
)
"""What every worker can do, including those of protocol 0, which do not announce it. Never add to this set."""

_BY_FIELD = {
    **{name: name for name in ("deterministic", "fit", "image", "mask", "negative_prompt", "partial_images")},
    "budget": "budget",
    "finish_within_seconds": "finish_within_seconds",
    "path": "budget",
    "width": "size",
}

CAPABILITIES = frozenset(
    {
        *(f"sampler.{name}" for name in SAMPLERS),
        *(f"format.{name}" for name in OutputFormat),
        *_BY_FIELD.values(),
        "metadata",
        "small_until",
    }
)
"""What workers of this version can do."""

OBJECT_STORE = "object_store"
"""What workers with an object store can do besides, and what jobs need whose picture to edit is there."""


class CardDetails(Message):
    """Fields of a `ModelCard` that protocol 0 does not have: its readers end at what they do not know in a card."""

    digest: str | None = Field(None, exclude_if=lambda digest: digest is None)
    weights_sha256: str | None = None
    usual_patch_evaluations: int | None = Field(None, exclude_if=lambda cost: cost is None)
    usual_seconds: float | None = Field(None, exclude_if=lambda seconds: seconds is None)
    least_seconds: float | None = Field(None, exclude_if=lambda seconds: seconds is None)
    least_seconds_more: float | None = Field(None, exclude_if=lambda seconds: seconds is None)
    examples: list[str] = Field([])
    sizes: list[Annotated[Size, Field(strict=False)]] = Field([], exclude_if=lambda sizes: not sizes)
    small_until: float = Field(0.0, exclude_if=lambda time: time == 0, description="Of the card's sampler.")


class Announcement(Message):
    """What a worker announces about itself, in addition to its models' cards."""

    protocol: int = Field(ge=0)
    capabilities: list[str]
    details: dict[str, CardDetails] = Field({}, description="By the name of the model.")


def split_card(card: ModelCard) -> tuple[ModelCard, CardDetails]:
    """A card as protocol 0 knows it, and the rest."""
    fields = CardDetails.model_fields.keys() - {"small_until"}
    small_until = _small_until(card.sampler)
    rest = CardDetails.model_validate({name: getattr(card, name) for name in fields} | {"small_until": small_until})
    plain = {name: ModelCard.model_fields[name].default for name in fields}
    return card.model_copy(update=plain | {"sampler": _with_small_until(card.sampler, 0.0)}), rest


def whole_card(card: ModelCard, details: CardDetails | None) -> ModelCard:
    """What `split_card` split."""
    if details is None:
        return card
    update = dict(details)
    update["sampler"] = _with_small_until(card.sampler, update.pop("small_until"))
    return card.model_copy(update=update)


def _small_until(sampler: Sampler | None) -> float:
    return sampler.small_until if isinstance(sampler, Adaptive) else 0.0


def _with_small_until(sampler: Sampler, time: float) -> Sampler:
    return sampler.model_copy(update={"small_until": time}) if isinstance(sampler, Adaptive) else sampler


def digest_need(digest: str) -> str:
    """Returns the capability of a worker that serves the bundle with this digest, which no other worker has."""
    return f"digest.{digest}"


def is_pin(need: str) -> bool:
    """Tells whether a capability is one of `digest_need`."""
    return need.startswith("digest.")


def needs_of(request: GenerationRequest) -> frozenset[str]:
    """Returns the capabilities that a worker needs to run this request, whose defaults are filled in.

    A new request field belongs here, unless a worker that ignores it draws the same picture.
    """
    needs = {f"format.{request.output_format}"}
    if request.sampler is not None:
        needs.add(f"sampler.{request.sampler.name}")
    if _small_until(request.sampler):
        needs.add("small_until")
    if not request.metadata:
        needs.add("metadata")
    if request.model_digest is not None:
        needs.add(digest_need(request.model_digest))
    return frozenset(needs | {word for field, word in _BY_FIELD.items() if getattr(request, field)})

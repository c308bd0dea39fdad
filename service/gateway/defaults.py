"""What a request means for the model that draws it: whether it fits, its defaults, and its budget."""

from __future__ import annotations

import secrets
from math import prod
from typing import Any

from patchforge.class_names import NoSuchClass, match_class
from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.fit import Fit, is_same_shape
from patchforge.service.messages.samplers import Adaptive, Quality, preset
from patchforge.service.messages.schemas import GenerationRequest, ModelCard

SEEDS = 2**32  # random seeds are below this: easy to copy by hand, and exact in JavaScript


def check_fits_model(request: GenerationRequest, card: ModelCard) -> None:
    """Checks that `card`'s model can draw the request.

    Raises:
        InvalidRequest: it cannot; `field` says why.
    """
    if card.kind == "text" and request.prompt is None:
        raise InvalidRequest(f"{card.name} is a text model: use `prompt` instead", field="class_label")
    if card.kind == "class":
        if request.class_label is None:
            raise InvalidRequest(f"{card.name} is a class model: use `class_label` instead", field="prompt")
        _match_class(request.class_label, card)
    if request.negative_prompt and card.kind == "class":
        raise InvalidRequest(f"{card.name} is a class model: it has no negative prompt", field="negative_prompt")
    if request.image is not None and request.sampler is not None and not isinstance(request.sampler, Adaptive):
        raise InvalidRequest("only the `adaptive` sampler can start from a picture", field="sampler")
    other_steps = any(change.steps for change in request.path or ())
    if other_steps and request.sampler is not None and not isinstance(request.sampler, Adaptive):
        raise InvalidRequest("only the `adaptive` sampler can take its path in other steps", field="path")


def _match_class(class_label: str, card: ModelCard) -> str:
    """Returns the model's own label of the class that a request means.

    Raises:
        InvalidRequest: no class has this name, or several have.
    """
    try:
        return match_class(class_label, card.classes)
    except NoSuchClass as error:
        raise InvalidRequest(f"{error}. /v1/models lists the classes of {card.name}", field="class_label") from error


def check_budget(request: GenerationRequest, card: ModelCard) -> None:
    """Checks that the budget of a request whose defaults are filled in is enough for one look at every patch.

    Raises:
        InvalidRequest: it is not.
    """
    least = _least_budget(request, card)
    if request.budget is not None and request.budget < least:
        raise InvalidRequest(f"must be at least {least} patch evaluations, one look at every patch", field="budget")


def budget_of(request: GenerationRequest, card: ModelCard) -> int | None:
    """Returns a request's budget in patch evaluations. A share never means less than one look at every patch."""
    if request.budget_share is None:
        return request.budget
    return max(_least_budget(request, card), round(request.budget_share * _usual_cost(request, card)))


def _usual_cost(request: GenerationRequest, card: ModelCard) -> float:
    """Patch evaluations that the model's own choice takes for such a picture.

    If it is small first, this was measured so. Other sizes and edited pictures are not: for these it is at most that.
    """
    patches, own = prod(card.drawn_grid(request)), prod(card.grid)
    small_first = isinstance(card.sampler, Adaptive) and card.sampler.small_until > 0
    if card.usual_patch_evaluations is None or (small_first and (patches != own or request.image is not None)):
        return 2 * card.steps * patches
    return card.usual_patch_evaluations * patches / own


def _least_budget(request: GenerationRequest, card: ModelCard) -> int:
    """Patch evaluations of one look at every patch. Only `adaptive` can leave guidance out of it."""
    branches = 1 if isinstance(request.sampler or card.sampler, Adaptive) or request.guidance == 1 else 2
    return branches * prod(card.drawn_grid(request))


def is_degradable(request: GenerationRequest) -> bool:
    """Returns whether load may lower the quality of a request: it fixes neither that nor the path, nor every bit."""
    fixed = request.sampler is not None or request.steps is not None or request.path or request.deterministic
    return request.degrade is not False and not fixed


def fill_defaults(request: GenerationRequest, card: ModelCard) -> GenerationRequest:
    """Returns `request` with every default filled in, so that running it twice draws the same pictures."""
    quality = request.quality
    if request.image is not None and quality is None and not isinstance(card.sampler, Adaptive):
        quality = Quality.STANDARD  # the model's own sampler cannot start from a picture
    sampler, steps = preset(quality, card.sampler, card.steps) if quality else (card.sampler, card.steps)
    chosen = {
        "model": card.name,
        "seed": secrets.randbelow(SEEDS),
        "sampler": sampler,
        "steps": steps,
        "guidance": card.guidance,
    }
    size = request.width or card.width, request.height or card.height
    if not is_same_shape(size, card.size):  # though a further size may have this shape: older workers draw their own
        chosen["fit"] = Fit.CONTAIN
    open_fields = {name: value for name, value in chosen.items() if getattr(request, name) is None}
    # Sampler and steps replace the quality, and patch evaluations the share.
    # A job that may be degraded says so in its record, not in its request, which older workers must be able to read.
    settled: dict[str, Any] = {"quality": None, "budget": budget_of(request, card), "budget_share": None}
    settled["degrade"] = None
    if request.class_label is not None:
        settled["class_label"] = _match_class(request.class_label, card)
    return request.model_copy(update=open_fields | settled)

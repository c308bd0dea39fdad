"""The models that the live workers serve, and the choice of a model for a request."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from patchforge.class_names import knows_class
from patchforge.service.errors import NotFound, TooLittleTime, Unavailable, Unsupported
from patchforge.service.messages.samplers import Adaptive
from patchforge.service.messages.schemas import GenerationRequest, ModelCard
from patchforge.service.queue.records import Served


class Fleet:
    """The live workers and their models at one moment, and models whose workers have gone but may come back."""

    def __init__(
        self, workers: Iterable[Served], preferred: Sequence[str] = (), remembered: Iterable[Served] = ()
    ) -> None:
        """Models named in `preferred` come first, in that order; the others follow by name.

        `remembered` has one card in each. It counts only for models that no live worker serves.
        """
        self._workers = list(workers)
        named = [[*served.unreadable, *(card.name for card in served.cards)] for served in self._workers]
        live = frozenset(name for names in named for name in names)
        asleep = [served for served in map(_asleep, remembered) if live.isdisjoint(card.name for card in served.cards)]
        self.asleep = frozenset(card.name for served in asleep for card in served.cards)
        """Names of the models that no live worker serves."""
        self._workers += asleep
        self._bundles = {(card.name, card.digest): card for served in self._workers for card in served.cards}
        self._abilities: dict[str, set[frozenset[str]]] = {}
        """Model → the different capabilities of its workers: there are few, however many workers."""
        for served in self._workers:
            for card in served.cards:
                self._abilities.setdefault(card.name, set()).add(served.capabilities)
        # A name may stand for several bundles while one replaces another: the newest describes it.
        oldest_first = sorted(self._bundles.values(), key=lambda card: (card.created, card.digest or ""))
        cards = {card.name: card for card in oldest_first}
        places = {name: place for place, name in enumerate(preferred)}
        self.cards = sorted(cards.values(), key=lambda card: (places.get(card.name, len(places)), card.name))
        """One card per model, in that order."""

    def served_by(self, card: ModelCard) -> Served:
        """Returns a card of this fleet, with what a worker that serves this bundle can do: the most able one."""
        bundle = card.name, card.digest
        able = [
            served.capabilities
            for served in self._workers
            if bundle in [(other.name, other.digest) for other in served.cards]
        ]
        return Served([card], max(able, key=len))

    @property
    def bundles(self) -> frozenset[tuple[str, str | None]]:
        """Name and digest of every bundle that is served. Older workers tell no digest."""
        return frozenset(self._bundles)

    def digests(self, name: str) -> list[str]:
        """Returns the digests of the bundles that are served under a name."""
        return sorted(digest for served, digest in self._bundles if served == name and digest is not None)

    def find(self, name: str) -> ModelCard:
        """Returns the model of that name.

        Raises:
            NotFound: no worker serves it.
            Unsupported: this gateway cannot read its card.
            Unavailable: no worker serves any model.
        """
        for card in self.cards:
            if card.name == name:
                return card
        for served in self._workers:
            if name in served.unreadable:
                raise Unsupported(f"this gateway cannot use the model: {served.unreadable[name]}", field="model")
        self._require_models()
        raise NotFound("no such model: /v1/models lists those that are served", field="model")

    def choose_for(self, request: GenerationRequest, *, prompt_may_be_class: bool = False) -> ModelCard:
        """Returns the model that a request names or pins by its digest, or else the first that fits.

        A prompt needs a text model. A class label needs a class model, if possible one that has this class. With
        `prompt_may_be_class`, a prompt may also be the name of a class if no text model is served.

        Raises:
            NotFound: no such model is served, or not with this digest.
            Unsupported: this gateway cannot read the card of the named model.
            Unavailable: no worker serves any model.
        """
        if request.model_digest is not None:
            return self._find_pinned(request.model_digest, request.model)
        if request.model is not None:
            return self.find(request.model)
        cards = self._require_models()
        if request.prompt is not None:
            fitting = [card for card in cards if card.kind == "text"]
            if not fitting and prompt_may_be_class:
                fitting = [card for card in cards if knows_class(request.prompt, card.classes)]
        else:
            fitting = [card for card in cards if card.kind == "class"]
            fitting.sort(key=lambda card: not knows_class(request.class_label, card.classes))
        if not fitting:
            takes = "a class label" if request.prompt is None else "a prompt"
            raise NotFound(f"no worker serves a model that takes {takes}", field="model")
        return fitting[0]

    def _find_pinned(self, digest: str, name: str | None) -> ModelCard:
        for card in self._bundles.values():
            if card.digest == digest and name in (None, card.name):
                return card
        self._require_models()
        if name is None:
            raise NotFound("no worker serves a model with this digest", field="model_digest")
        self.find(name)
        there = ", ".join(self.digests(name)) or "none that is known"
        raise NotFound(f"no worker serves {name} with this digest; served: {there}", field="model_digest")

    def check_capabilities(self, model: str, needs: Collection[str]) -> None:
        """Checks that a worker of the model has all capabilities in `needs`.

        Raises:
            Unsupported: no worker has them all.
        """
        lacking = sorted((sorted({*needs} - able) for able in self._abilities.get(model, ())), key=len)
        if lacking and lacking[0]:
            raise Unsupported(f"no worker that serves {model} supports this: {', '.join(lacking[0])}")

    def check_time(self, request: GenerationRequest) -> None:
        """Checks that a worker could finish the pictures within `finish_within_seconds`, as far as workers can tell.

        Raises:
            TooLittleTime: none could, even at the lowest quality.
        """
        within = request.finish_within_seconds
        if within is None:
            return
        cards = [
            card
            for served in self._workers
            for card in served.cards
            if card.name == request.model and request.model_digest in (None, card.digest)
        ]
        times = [seconds for card in cards if (seconds := _least_seconds(card, request)) is not None]
        if len(times) == len(cards) and within < (least := min(times, default=0.0)):
            raise TooLittleTime(f"it would take {least:.2g} seconds", field="finish_within_seconds", retry_after=1)

    def _require_models(self) -> list[ModelCard]:
        if not self.cards:
            raise Unavailable("no worker is serving a model", retry_after=5)
        return self.cards


def _least_seconds(card: ModelCard, request: GenerationRequest) -> float | None:
    """The least time in which a worker could finish all pictures of a request together; None: it has not told.

    Pictures of a smaller size count by their patches. Less than one of the model's own takes at least that share of its
    time, since small evaluations take no less per patch than large ones. Fewer steps or a smaller budget than in the
    model's own choice take as much less.
    """
    if card.least_seconds is None:
        return None
    pictures = request.n * math.prod(card.drawn_grid(request)) / math.prod(card.grid)
    share = _share_of_usual(card, request)
    # Before the first one is begun, others are drawn, however few steps it has. Only its own time can be less.
    alone = min(card.least_seconds, card.usual_seconds or math.inf)
    first = card.least_seconds - (1 - share * min(pictures, 1.0)) * alone
    return first + share * (card.least_seconds_more or 0.0) * max(0.0, pictures - 1)


def _share_of_usual(card: ModelCard, request: GenerationRequest) -> float:
    """How much of the patch evaluations of the model's own choice a request's own steps and budget allow: at most 1.

    Further steps do not count, since workers leave them out. In doubt it is too small: better a late picture than a
    request that is refused and could have been met.
    """
    sampler, steps = request.sampler or card.sampler, request.steps or card.steps
    unguided = (card.guidance if request.guidance is None else request.guidance) == 1
    own = math.prod(card.grid)
    usual = card.usual_patch_evaluations or 2 * card.steps * own
    if isinstance(sampler, Adaptive) and isinstance(card.sampler, Adaptive):
        share = steps / card.steps / (2 if unguided and card.guidance != 1 else 1)
        if sampler.small_until > card.sampler.small_until:
            share /= 4  # at least: a quarter of the patches
    else:  # some evaluate more than once per step; only `adaptive` can leave guidance out
        share = steps * own * (1 if unguided or isinstance(sampler, Adaptive) else 2) / usual
    if request.budget is not None:
        share = min(share, request.budget / math.prod(card.drawn_grid(request)) * own / usual)
    return min(share, 1.0)


def _asleep(remembered: Served) -> Served:
    """What a worker served, without how long a picture would take: that depends on when a worker is there."""
    unknown = {"least_seconds": None, "least_seconds_more": None}
    cards = [card.model_copy(update=unknown) for card in remembered.cards]
    return replace(remembered, cards=cards)

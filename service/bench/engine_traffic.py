"""Random mixed traffic that repeats with its seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from patchforge.model.pipeline import Pipeline
from patchforge.service.messages.fit import Size
from patchforge.service.messages.samplers import Quality, preset
from patchforge.service.messages.schemas import GenerationRequest, Job, JobStatus
from patchforge.service.worker.cards import model_card

SAMPLERS: list[tuple[float, dict[str, Any], tuple[int, ...]]] = [
    (7, {"name": "adaptive"}, (10, 12, 16)),
    (2, {"name": "multistep"}, (8, 10, 12)),
    (2, {"name": "dual_loop"}, (4, 6, 8)),
    (1, {"name": "look_ahead"}, (8, 12)),
    (1, {"name": "heun"}, (4, 6, 8)),
    (1, {"name": "euler"}, (12, 16, 24)),
]
"""Weight, sampler with its own defaults, and numbers of steps; half of the requests use adaptive, our default."""
QUALITIES = [(4, Quality.STANDARD), (2, Quality.DRAFT), (1, Quality.HIGH)]
"""Weight and preset of requests that use presets."""
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
PICTURES = (1, 1, 1, 2)
PROMPTS = ("red apple", "grinning face", "dog face", "blue heart", "automobile", "one oclock", "tulip", "pizza")


@dataclass(frozen=True)
class Arrival:
    """One request of the traffic."""

    at: float
    """Time since the start, in mean gaps between requests."""
    request: GenerationRequest

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for requests that other servers would batch."""
        request = self.request
        return request.model, repr(request.sampler), request.steps, request.asked_size

    def job(self, dense: bool) -> Job:
        """The accepted request; with `dense`, its sampler evaluates every patch in every step."""
        request, sampler = self.request, self.request.sampler
        if dense and sampler is not None and "exact" in type(sampler).model_fields:
            request = request.model_copy(update={"sampler": sampler.model_copy(update={"exact": True})})
        return Job(id=f"{request.seed}", status=JobStatus.RUNNING, request=request, created_at=0.0)


def mixed_traffic(
    pipelines: dict[str, Pipeline],
    count: int,
    seed: int,
    presets: bool = False,
    adaptive_only: bool = False,
    sizes: Sequence[Size] = (),
) -> list[Arrival]:
    """Requests with exponential gaps, `count` gaps long; scaled, this is the same traffic at any rate.

    With `presets`, requests for adaptive use the model's quality presets. With `adaptive_only`, all requests use
    adaptive. `sizes` are asked for equally often; without any, requests have their model's own.
    """
    samplers = [entry for entry in SAMPLERS if entry[1]["name"] == "adaptive" or not adaptive_only]
    chance = Random(seed)
    times = list(accumulate(chance.expovariate(1.0) for _ in range(count)))
    times = [at * count / times[-1] for at in times]
    names = sorted(pipelines)
    arrivals = []
    for number, at in enumerate(times):
        model = chance.choice(names)
        classes = pipelines[model].manifest.class_names
        subject = {"class_label": chance.choice(classes)} if classes else {"prompt": chance.choice(PROMPTS)}
        [(_, sampler, steps)] = chance.choices(samplers, [weight for weight, _, _ in samplers])
        fields: dict[str, Any] = {"model": model, "sampler": sampler, "steps": chance.choice(steps), **subject}
        fields |= {"guidance": chance.choice(GUIDANCE), "n": chance.choice(PICTURES), "seed": 100 * number}
        if presets and sampler["name"] == "adaptive":
            fields |= _draw_preset(pipelines[model], chance)
        if sizes:
            fields["width"], fields["height"] = chance.choice(sizes)
        arrivals.append(Arrival(at, GenerationRequest.model_validate(fields)))
    return arrivals


def even_traffic(pipeline: Pipeline, count: int, seed: int) -> list[Arrival]:
    """Requests for one picture each of the model's own choice, with exponential gaps, `count` gaps long."""
    chance, card = Random(seed), model_card(pipeline.manifest)
    times = list(accumulate(chance.expovariate(1.0) for _ in range(count)))
    arrivals = []
    for number, at in enumerate(times):
        subject = {"class_label": chance.choice(card.classes)} if card.classes else {"prompt": chance.choice(PROMPTS)}
        fields = {"model": card.name, "sampler": card.sampler.model_dump(), "steps": card.steps, "previews": False}
        fields |= {"guidance": card.guidance, "seed": 100 * number, **subject}
        arrivals.append(Arrival(at * count / times[-1], GenerationRequest.model_validate(fields)))
    return arrivals


def _draw_preset(pipeline: Pipeline, chance: Random) -> dict[str, Any]:
    [(_, quality)] = chance.choices(QUALITIES, [weight for weight, _ in QUALITIES])
    card = model_card(pipeline.manifest)
    sampler, steps = preset(quality, card.sampler, card.steps)
    return {"sampler": sampler.model_dump(), "steps": steps, "guidance": card.guidance}

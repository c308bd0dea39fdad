"""Seeded mixed traffic: who asks for what, and when."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from model.pipeline import Pipeline
from service.sampler_options import Quality, preset
from service.schemas import GenerationRequest, Job, JobStatus
from service.worker.cards import model_card

SAMPLERS: list[tuple[float, dict[str, Any], tuple[int, ...]]] = [
    (7, {"name": "adaptive"}, (10, 12, 16)),
    (2, {"name": "multistep"}, (8, 10, 12)),
    (2, {"name": "dual_loop"}, (4, 6, 8)),
    (1, {"name": "look_ahead"}, (8, 12)),
    (1, {"name": "heun"}, (4, 6, 8)),
    (1, {"name": "euler"}, (12, 16, 24)),
]
"""Weight, sampler with its own defaults, and the steps asked for; half of all is adaptive, the product's choice."""
QUALITIES = [(4, Quality.STANDARD), (2, Quality.DRAFT), (1, Quality.HIGH)]
"""Weight and preset, of what is asked for by presets."""
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
PICTURES = (1, 1, 1, 2)
PROMPTS = ("red apple", "grinning face", "dog face", "blue heart", "automobile", "one oclock", "tulip", "pizza")


@dataclass(frozen=True)
class Arrival:
    """One request of the traffic."""

    at: float
    """In mean gaps between requests, from the start."""
    request: GenerationRequest

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for requests that a peer would batch."""
        return self.request.model, repr(self.request.sampler), self.request.steps

    def job(self, dense: bool) -> Job:
        """The request as accepted; ``dense`` has its sampler evaluate every patch every time, if it does otherwise."""
        request, sampler = self.request, self.request.sampler
        if dense and sampler is not None and "exact" in type(sampler).model_fields:
            request = request.model_copy(update={"sampler": sampler.model_copy(update={"exact": True})})
        return Job(id=f"{request.seed}", status=JobStatus.RUNNING, request=request, created_at=0.0)


def mixed_traffic(
    pipelines: dict[str, Pipeline], count: int, seed: int, presets: bool = False, adaptive_only: bool = False
) -> list[Arrival]:
    """Requests with exponential gaps, ``count`` gaps long in all: scaled, the same traffic at any rate.

    With ``presets`` those for adaptive are as the model serves them when a quality is all that is said. With
    ``adaptive_only`` nobody asks for another sampler.
    """
    samplers = [each for each in SAMPLERS if each[1]["name"] == "adaptive" or not adaptive_only]
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
            fields |= _preset(pipelines[model], chance)
        arrivals.append(Arrival(at, GenerationRequest.model_validate(fields)))
    return arrivals


def _preset(pipeline: Pipeline, chance: Random) -> dict[str, Any]:
    [(_, quality)] = chance.choices(QUALITIES, [weight for weight, _ in QUALITIES])
    card = model_card(pipeline.manifest)
    sampler, steps = preset(quality, card.sampler, card.steps)
    return {"sampler": sampler.model_dump(), "steps": steps, "guidance": card.guidance}

"""Measures how many answers come in time under load, and how good they are: batches, fixed quality, and anytime.

Every request asks for the model's own choice, and wants its answer within a multiple of the time that it takes alone.
The clock runs while the engine computes, and jumps to the next arrival while it has nothing to do.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import run
from patchforge.service.bench.engine_traffic import Arrival, even_traffic
from patchforge.service.bench.policies import RequestLevel
from patchforge.service.messages.samplers import Multistep, Quality, preset
from patchforge.service.messages.schemas import GenerationRequest
from patchforge.service.settings import WorkerSettings
from patchforge.service.worker.cards import model_card
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.outcomes import JobBroken, JobDone
from patchforge.service.worker.pace import Backlog
from patchforge.service.worker.pacer import Pacer
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler

REQUEST = "request-level batching"
FIXED = "ours, fixed quality"
ANYTIME = "ours, anytime"
POLICIES = (REQUEST, FIXED, ANYTIME)
LOADS = (0.5, 0.75, 1.0, 1.5, 2.0)
WITHIN = (5.0, 3.0)
"""Multiples of the time alone."""
MAX_RUNNING = 16
"""Jobs in flight, as a worker's default; request-level batching sees all waiting jobs, an advantage."""
CACHE_BYTES = 2 << 30
ROUNDING = 1e-9
ALONE = 8
"""Requests that are timed alone."""
FINE = {"sampler": Multistep(), "steps": 24}
"""What answers are compared with: a solution of many more evaluations."""
MOST_DB = 60.0
"""PSNR of equal pictures."""
Clock = Callable[[], float]


@dataclass
class Jumping:
    """A clock that can be moved forward."""

    real: Clock
    ahead: float = 0.0

    def __call__(self) -> float:
        return self.real() + self.ahead

    def jump_to(self, time: float) -> None:
        self.ahead += max(0.0, time - self())


@dataclass
class Answers:
    """What became of one traffic, by job id."""

    seconds: dict[str, float] = field(default_factory=dict)
    """From arrival to the finished picture."""
    latents: dict[str, Tensor] = field(default_factory=dict)
    """`(P, D)`."""
    patches: int = 0
    lowered: int = 0
    span: float = 0.0
    """From the first arrival to the last answer."""


@dataclass(frozen=True)
class SloRow:
    """One policy at one load."""

    within: float
    """Multiple of the time alone within which answers are wanted."""
    policy: str
    load: float
    """Offered rate ÷ our capacity at fixed quality."""
    in_time: float
    """Share of the answers."""
    p50: float
    p99: float
    patches: float
    """Patch evaluations per request."""
    lowered: float
    """Share of the answers whose quality load lowered."""
    psnr: float
    """Mean over all answers, in dB against a fine solution."""


@dataclass(frozen=True)
class SloReport:
    """The rows, and what they are relative to."""

    alone: float
    """Seconds of a request alone, median."""
    capacity: float
    """Requests per second of our engine at fixed quality, with requests always waiting."""
    psnr: dict[str, float]
    """Preset → PSNR of all requests at that quality."""
    rows: list[SloRow]


class SloBench:
    """Serves the same arrivals with every policy."""

    def __init__(self, pipeline: Pipeline, requests: int, budget: int, clock: Clock, seed: int = 0) -> None:
        """`budget`: most patches per evaluation. `clock` counts seconds."""
        self.pipeline = pipeline
        self.arrivals = even_traffic(pipeline, requests, seed)
        self._clock = clock
        self._budgets = {pipeline.manifest.name: budget}
        self._pacer = Pacer({pipeline.manifest.name: pipeline}, self._budgets, WorkerSettings().min_quality)

    def run(self, loads: Sequence[float], within: Sequence[float] = WITHIN) -> SloReport:
        """Measure a request alone and the capacity, then every policy at every load.

        Raises:
            RuntimeError: a request failed.
        """
        some = self.arrivals[:ALONE]
        self.serve(FIXED, some, 0.0)  # warms up
        alone = median(seconds for each in some for seconds in self.serve(FIXED, [each], 0.0).seconds.values())
        full = self.serve(FIXED, self.arrivals, 0.0)
        gap = full.span / len(self.arrivals)
        requests = [arrival.job(dense=False).request for arrival in self.arrivals]
        fine = [_draw(self.pipeline, each.model_copy(update=FINE)) for each in requests]
        rows = []
        for load in loads:
            for policy in POLICIES:
                for target in within if policy == ANYTIME else within[:1]:
                    found = self.serve(policy, self.arrivals, gap / load, target)
                    psnr = _psnr(self.pipeline, list(found.latents.values()), fine)
                    limits = [target] if policy == ANYTIME else within
                    rows += [_row(limit, policy, load, found, limit * alone, psnr) for limit in limits]
        rows.sort(key=lambda row: (-row.within, row.load, POLICIES.index(row.policy)))
        card = model_card(self.pipeline.manifest)
        psnrs = {}
        for quality in (Quality.DRAFT, Quality.STANDARD):
            sampler, steps = preset(quality, card.sampler, card.steps)
            changed = [each.model_copy(update={"sampler": sampler, "steps": steps}) for each in requests]
            psnrs[quality.value] = _psnr(self.pipeline, [_draw(self.pipeline, each) for each in changed], fine)
        return SloReport(alone, 1 / gap, psnrs, rows)

    def serve(self, policy: str, arrivals: Sequence[Arrival], gap: float, target: float | None = None) -> Answers:
        """Let one policy serve the traffic, with a mean of `gap` seconds between requests."""
        jobs = [arrival.job(dense=policy == REQUEST) for arrival in arrivals]
        [name] = self._budgets
        clock = Jumping(self._clock, -self._clock())
        self._pacer.target = target if policy == ANYTIME else None
        alike = dict.fromkeys(job.id for job in jobs)
        chooser = RequestLevel(alike) if policy == REQUEST else Scheduler(self._budgets, self._pacer.limits)
        pacer = None if policy == REQUEST else self._pacer
        engine = Engine({name: self.pipeline}, chooser, PreviewPace(0.0, 0.0), CACHE_BYTES, pacer, clock)
        most = len(jobs) if policy == REQUEST else MAX_RUNNING
        answers, coming, pictures = Answers(), 0, {}
        times = [arrival.at * gap for arrival in arrivals]
        while len(answers.seconds) < len(jobs):
            here = bisect(times, clock() + ROUNDING)
            for job, at in zip(jobs[coming:here], times[coming:here], strict=True):
                if len(engine.jobs) == most:
                    break
                self.pipeline.forget_texts()  # as if all prompts were different
                told = {"created_at": at, "started_at": max(at, clock()), "degradable": policy == ANYTIME}
                [pictures[job.id]] = engine.admit(job.model_copy(update=told)).pictures
                coming += 1
            if not engine.jobs:
                clock.jump_to(times[coming])
                continue
            waiting = here - coming
            oldest = clock() - times[coming] if waiting > 0 else 0.0
            self._pacer.backlogs = {name: Backlog(waiting, oldest)} if waiting > 0 else {}
            for outcome in engine.step():
                if isinstance(outcome, JobBroken):
                    raise RuntimeError(f"request {outcome.job_id} failed: {outcome.error.message}")
                if isinstance(outcome, JobDone):
                    answers.seconds[outcome.job_id] = outcome.report.duration_seconds
                    answers.patches += outcome.report.patch_evaluations
                    answers.lowered += outcome.report.lowered_by is not None
        answers.span = clock()
        answers.latents = {job.id: pictures[job.id].trajectory.state.x for job in jobs}
        return answers


def _row(within: float, policy: str, load: float, found: Answers, limit: float, psnr: float) -> SloRow:
    seconds = torch.tensor(list(found.seconds.values()), dtype=torch.float64)
    count = len(seconds)
    return SloRow(
        within=within,
        policy=policy,
        load=load,
        in_time=float((seconds <= limit).double().mean()),
        p50=float(seconds.quantile(0.5)),
        p99=float(seconds.quantile(0.99)),
        patches=found.patches / count,
        lowered=found.lowered / count,
        psnr=psnr,
    )


def _draw(pipeline: Pipeline, request: GenerationRequest) -> Tensor:
    """The latents `(P, D)` of a request, drawn alone."""
    options = request.sampler.model_dump() if request.sampler else {"name": "adaptive"}
    sampler = pipeline.sampler(options.pop("name"), request.steps or 1, request.guidance or 0.0, **options)
    condition, _ = pipeline.condition(request.prompt, request.class_label)
    trajectory = pipeline.begin(sampler, condition, pipeline.noise(request.seed or 0))
    run(pipeline.denoiser, [trajectory])
    return trajectory.state.x


def _psnr(pipeline: Pipeline, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean PSNR of the pictures of latents, in dB; `MOST_DB` for equal ones."""
    values = []
    for one, other in zip(found, wanted, strict=True):
        a, b = pipeline.decode(torch.stack([one, other])).float()
        error = float((a - b).square().mean())
        values.append(MOST_DB if error == 0 else min(MOST_DB, 10 * math.log10(255**2 / error)))
    return sum(values) / len(values)

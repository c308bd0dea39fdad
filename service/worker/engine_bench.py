"""The engine under open-loop mixed traffic, against how others batch: rates, latencies and the sameness of pictures.

Time is the engine's own: a step moves the clock by what it took, and while nothing is to be done the clock jumps to
the next arrival. So waiting costs the benchmark nothing, and every policy meets the very same arrivals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median

import torch
from torch import Tensor

from model.evaluation.paper_forward import as_the_paper
from model.generate import Trajectory, run
from model.pipeline import Pipeline
from service.schemas import Job
from service.worker.bench_policies import OneAtATime, RequestLevel, StepLevel
from service.worker.bench_traffic import Arrival
from service.worker.engine import Chooser, Engine
from service.worker.outcomes import JobBroken, JobDone, PreviewMade
from service.worker.previews import PreviewPace
from service.worker.scheduler import Scheduler

OURS = "ours: patches of all requests"
ONE = "one at a time"
PAPER = "request-level, the paper's forward"
REQUEST = "request-level batching"
STEP = "step-level batching of equals"
POLICIES = (ONE, PAPER, REQUEST, STEP, OURS)
MAX_RUNNING = 16
"""Jobs in flight of ours, as a worker's default; the others see all that wait, which can only help them."""
CACHE_BYTES = 2 << 30
WARM_UP = 6
"""Requests served before anything is measured."""
PREVIEW_INTERVAL, PREVIEW_SHARE = 0.1, 0.1
Clock = Callable[[], float]
Latents = dict[str, list[Tensor]]
"""``(P, D)`` of each picture, by job id."""


@dataclass
class Served:
    """What became of the traffic; times in seconds from the first arrival, by job id."""

    arrived: dict[str, float] = field(default_factory=dict)
    first_preview: dict[str, float] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)
    latents: Latents = field(default_factory=dict)
    evaluations: int = 0
    patches: int = 0
    seconds: float = 0.0
    """Spent working."""


@dataclass(frozen=True)
class EngineRow:
    """One policy at one load."""

    policy: str
    load: float
    """Offered, as a share of the capacity of request-level batching; infinite: everything waits at the start."""
    offered: float
    """Requests a second."""
    completed: float
    """Requests a second, from the first arrival to the last completion."""
    p50: float
    p95: float
    p99: float
    preview_p50: float
    """Seconds from arrival to the first preview, or to the picture if that came first."""
    preview_p95: float
    patches_per_evaluation: float
    patch_evaluations: float
    """A request."""
    busy: float
    """Share of the time spent working."""


MEASURED = tuple(each.name for each in fields(EngineRow) if each.name not in ("policy", "load", "offered"))


def serve(
    pipelines: dict[str, Pipeline],
    policy: str,
    arrivals: list[Arrival],
    gap: float,
    budgets: dict[str, int],
    clock: Clock,
) -> Served:
    """Let one policy serve the traffic with ``gap`` seconds between requests in the mean.

    Raises:
        RuntimeError: a request failed.
    """
    jobs = [each.job(dense=policy != OURS) for each in arrivals]
    if policy == PAPER:
        pipelines = {name: as_the_paper(pipeline) for name, pipeline in pipelines.items()}
    chooser = _chooser(policy, {job.id: each.kind for job, each in zip(jobs, arrivals, strict=True)}, budgets)
    engine = Engine(pipelines, chooser, PreviewPace(PREVIEW_INTERVAL, PREVIEW_SHARE), CACHE_BYTES)
    most = MAX_RUNNING if policy == OURS else len(jobs)
    served, now, coming = Served(), 0.0, 0
    pictures = {}
    while len(served.finished) < len(jobs):
        began = clock()
        while coming < len(jobs) and arrivals[coming].at * gap <= now and len(engine.jobs) < most:
            served.arrived[jobs[coming].id] = arrivals[coming].at * gap
            pipelines[arrivals[coming].request.model or ""].forget_texts()  # as if no two prompts were alike
            pictures[jobs[coming].id] = engine.admit(jobs[coming]).pictures
            coming += 1
        if not engine.jobs:
            now = arrivals[coming].at * gap
            continue
        outcomes = engine.step()
        now, served.seconds = now + (took := clock() - began), served.seconds + took
        served.evaluations += 1
        served.patches += engine.last_evaluation[0]
        for outcome in outcomes:
            match outcome:
                case PreviewMade():
                    served.first_preview.setdefault(outcome.job_id, now)
                case JobDone():
                    served.finished[outcome.job_id] = now
                    served.latents[outcome.job_id] = [each.trajectory.state.x for each in pictures.pop(outcome.job_id)]
                case JobBroken():
                    raise RuntimeError(f"request {outcome.job_id} failed: {outcome.error.message}")
    return served


def _chooser(policy: str, kinds: dict[str, tuple[object, ...]], budgets: dict[str, int]) -> Chooser:
    if policy == ONE:
        return OneAtATime()
    if policy in (PAPER, REQUEST):
        return RequestLevel(kinds)
    return StepLevel(kinds) if policy == STEP else Scheduler(budgets)


def row(policy: str, load: float, gap: float, rounds: list[Served]) -> EngineRow:
    """What was measured, in the median over the rounds: one in which the machine was slow does not count."""
    each = [_row(policy, load, gap, served) for served in rounds]
    middle = {name: median(getattr(row, name) for row in each) for name in MEASURED}
    return replace(each[0], **middle)


def _row(policy: str, load: float, gap: float, served: Served) -> EngineRow:
    arrived, finished, shown = torch.tensor(
        [
            (at, served.finished[job], served.first_preview.get(job, served.finished[job]))
            for job, at in served.arrived.items()
        ],
        dtype=torch.float64,
    ).T
    latency, shown = finished - arrived, shown - arrived
    span = float(finished.max())
    return EngineRow(
        policy=policy,
        load=load,
        offered=1 / gap if gap else float("inf"),
        completed=len(finished) / span,
        p50=float(latency.quantile(0.5)),
        p95=float(latency.quantile(0.95)),
        p99=float(latency.quantile(0.99)),
        preview_p50=float(shown.quantile(0.5)),
        preview_p95=float(shown.quantile(0.95)),
        patches_per_evaluation=served.patches / served.evaluations,
        patch_evaluations=served.patches / len(finished),
        busy=served.seconds / span,
    )


def bench_engine(
    pipelines: dict[str, Pipeline],
    traffics: list[list[Arrival]],
    loads: list[float],
    budgets: dict[str, int],
    clock: Clock = time.perf_counter,
    policies: Sequence[str] = POLICIES,
) -> Iterator[tuple[EngineRow, list[Served]]]:
    """Every policy, `REQUEST` always among them, with everything waiting from the start, which gives their capacities;
    then at every load.

    After a warm-up of each. Machines drift, so each load is served in rounds, one a traffic, in which all policies take
    turns; whose turn is first changes with round and load. With every row come its rounds, in the traffics' order.
    """
    for policy in policies:
        serve(pipelines, policy, traffics[0][:WARM_UP], 0.0, budgets, clock)
    gap, turn = 0.0, 0
    for load in (float("inf"), *loads):
        found: dict[str, list[Served]] = {policy: [] for policy in policies}
        for arrivals in traffics:
            for index in range(len(policies)):
                policy = policies[(index + turn) % len(policies)]
                found[policy].append(serve(pipelines, policy, arrivals, gap / load, budgets, clock))
            turn += 1
        rows = [row(policy, load, gap / load, rounds) for policy, rounds in found.items()]
        yield from zip(rows, found.values(), strict=True)
        gap = gap or 1 / capacity_of(rows, REQUEST)  # of load 1


def capacity_of(rows: list[EngineRow], policy: str) -> float:
    """Requests a second that a policy completed while it never ran out of them: no rate above it can last."""
    return next(each.completed for each in rows if each.policy == policy and each.load == float("inf"))


def rate_at(rows: list[EngineRow], policy: str, p95: float) -> float:
    """The highest rate offered up to which a policy's p95 stays within ``p95``, interpolated between loads measured.

    0 if even the lowest is too much; never more than the policy's capacity, nor than the highest load measured.
    """
    points = sorted((each.offered, each.p95) for each in rows if each.policy == policy and each.load != float("inf"))
    best = 0.0
    for index, (rate, latency) in enumerate(points):
        if latency > p95:
            if index:
                before, low = points[index - 1]
                best = before + (rate - before) * (p95 - low) / (latency - low)
            break
        best = rate
    return min(best, capacity_of(rows, policy))


def alone(pipelines: dict[str, Pipeline], arrivals: list[Arrival]) -> Latents:
    """What each request makes all by itself, without the engine."""
    return {job.id: _drawn(pipelines[job.request.model or ""], job) for job in (each.job(False) for each in arrivals)}


def _drawn(pipeline: Pipeline, job: Job) -> list[Tensor]:
    request = job.request
    options = request.sampler.model_dump() if request.sampler else {"name": "euler"}
    sampler = pipeline.sampler(options.pop("name"), request.steps or 1, request.guidance or 0.0, **options)
    condition, _ = pipeline.condition(request.prompt, request.class_label)
    drawn = []
    for index in range(request.n):
        trajectory = Trajectory(sampler, condition, sampler.start(pipeline.noise((request.seed or 0) + index)))
        run(pipeline.denoiser, [trajectory])
        drawn.append(trajectory.state.x)
    return drawn


def largest_difference(rounds: list[Served], expected: list[Latents]) -> float:
    """Largest absolute difference of a final latent served from the one expected."""
    return max(
        float((found - wanted).abs().max())
        for served, latents in zip(rounds, expected, strict=True)
        for job, drawn in latents.items()
        for found, wanted in zip(served.latents[job], drawn, strict=True)
    )


def psnr_of_ours(
    pipelines: dict[str, Pipeline], traffics: list[list[Arrival]], ours: list[Served], dense: list[Served]
) -> float:
    """Median PSNR in dB of our pictures against those of dense evaluation of the same samplers; at most 60."""
    found = []
    for arrivals, *served in zip(traffics, ours, dense, strict=True):
        for arrival in arrivals:
            job = arrival.job(dense=False)
            decode = pipelines[job.request.model or ""].decode
            a, b = (decode(torch.stack(each.latents[job.id])).float() for each in served)
            error = (a - b).square().flatten(1).mean(dim=1)
            found.append(10 * torch.log10(255**2 / error.clamp(min=255**2 / 1e6)))
    return float(torch.cat(found).median())

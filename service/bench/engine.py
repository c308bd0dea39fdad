"""Measures the engine under open-loop mixed traffic, against other ways to batch: rates, latencies, equal pictures.

The clock is simulated: a step advances it by the step's duration, and while there is no work it jumps to the next
arrival. So the benchmark never waits, and every policy sees exactly the same arrivals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median

import torch
from torch import Tensor

from patchforge.model.experiments.paper_forward import as_the_paper
from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import run
from patchforge.service.bench.engine_traffic import Arrival
from patchforge.service.bench.policies import OneAtATime, RequestLevel, StepLevel
from patchforge.service.messages.schemas import Job
from patchforge.service.worker.engine import Chooser, Engine, drawn_size
from patchforge.service.worker.outcomes import JobBroken, JobDone, PreviewMade
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler

OURS = "ours: patches of all requests"
ONE = "one at a time"
PAPER = "request-level, the paper's forward"
REQUEST = "request-level batching"
STEP = "step-level batching of equals"
POLICIES = (ONE, PAPER, REQUEST, STEP, OURS)
MAX_RUNNING = 16
"""Jobs in flight for our policy, as a worker's default; the other policies see all waiting jobs, an advantage."""
CACHE_BYTES = 2 << 30
WARM_UP = 6
"""Requests served before the measurement."""
PREVIEW_INTERVAL, PREVIEW_SHARE = 0.1, 0.1
Clock = Callable[[], float]
Latents = dict[str, list[Tensor]]
"""`(P, D)` latents of every picture, by job id."""


@dataclass
class Served:
    """One served traffic; times by job id, in seconds since the start."""

    arrived: dict[str, float] = field(default_factory=dict)
    first_preview: dict[str, float] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)
    latents: Latents = field(default_factory=dict)
    evaluations: int = 0
    patches: int = 0
    seconds: float = 0.0
    """Time spent in steps."""


@dataclass(frozen=True)
class EngineRow:
    """One policy at one load."""

    policy: str
    load: float
    """Offered rate ÷ capacity of request-level batching; infinite if all requests are waiting at the start."""
    offered: float
    """Requests per second."""
    completed: float
    """Requests per second, from the first arrival to the last completion."""
    p50: float
    p95: float
    p99: float
    preview_p50: float
    """Seconds from arrival to the first preview, or to the picture if it came first."""
    preview_p95: float
    patches_per_evaluation: float
    patch_evaluations: float
    """Patch evaluations per request."""
    busy: float
    """Share of the time spent in steps."""


MEASURED = tuple(field.name for field in fields(EngineRow) if field.name not in ("policy", "load", "offered"))


def serve(
    pipelines: dict[str, Pipeline],
    policy: str,
    arrivals: list[Arrival],
    gap: float,
    budgets: dict[str, int],
    clock: Clock,
) -> Served:
    """Let one policy serve the traffic, with a mean of `gap` seconds between requests.

    Raises:
        RuntimeError: a request failed.
    """
    jobs = [arrival.job(dense=policy != OURS) for arrival in arrivals]
    if policy == PAPER:
        pipelines = {name: as_the_paper(pipeline) for name, pipeline in pipelines.items()}
    kinds = {job.id: arrival.kind for job, arrival in zip(jobs, arrivals, strict=True)}
    chooser = _make_chooser(policy, kinds, budgets)
    engine = Engine(pipelines, chooser, PreviewPace(PREVIEW_INTERVAL, PREVIEW_SHARE), CACHE_BYTES)
    most = MAX_RUNNING if policy == OURS else len(jobs)
    served, now, coming = Served(), 0.0, 0
    pictures = {}
    while len(served.finished) < len(jobs):
        began = clock()
        while coming < len(jobs) and arrivals[coming].at * gap <= now and len(engine.jobs) < most:
            served.arrived[jobs[coming].id] = arrivals[coming].at * gap
            pipelines[arrivals[coming].request.model or ""].forget_texts()  # as if all prompts were different
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
                    finished = pictures.pop(outcome.job_id)
                    served.latents[outcome.job_id] = [picture.trajectory.state.x for picture in finished]
                case JobBroken():
                    raise RuntimeError(f"request {outcome.job_id} failed: {outcome.error.message}")
    return served


def _make_chooser(policy: str, kinds: dict[str, tuple[object, ...]], budgets: dict[str, int]) -> Chooser:
    if policy == ONE:
        return OneAtATime()
    if policy in (PAPER, REQUEST):
        return RequestLevel(kinds)
    return StepLevel(kinds) if policy == STEP else Scheduler(budgets)


def row(policy: str, load: float, gap: float, rounds: list[Served]) -> EngineRow:
    """The median over the rounds, so that a round on a slow machine does not count."""
    rows = [_row_of_round(policy, load, gap, served) for served in rounds]
    medians = {name: median(getattr(found, name) for found in rows) for name in MEASURED}
    return replace(rows[0], **medians)


def _row_of_round(policy: str, load: float, gap: float, served: Served) -> EngineRow:
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
    """Measure every policy at every load; yields rows with their rounds, in the order of the traffics.

    `policies` must include `REQUEST`. After a warm-up, the capacities are measured with all requests waiting from
    the start; then come the loads. Because machines drift, every load is served in one round per traffic: the policies
    take turns, and the first policy changes with round and load.
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
    """Requests per second that a policy completed while requests were always waiting: the highest lasting rate."""
    return next(found.completed for found in rows if found.policy == policy and found.load == float("inf"))


def rate_at(rows: list[EngineRow], policy: str, p95: float) -> float:
    """The highest offered rate at which the policy's p95 is at most `p95`, interpolated between measured loads.

    0 if p95 is higher even at the lowest load; at most the policy's capacity and the highest measured load.
    """
    measured = (found for found in rows if found.policy == policy and found.load != float("inf"))
    points = sorted((found.offered, found.p95) for found in measured)
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
    """The latents of every request when it runs alone, without the engine."""
    jobs = [arrival.job(dense=False) for arrival in arrivals]
    return {job.id: _draw_alone(pipelines[job.request.model or ""], job) for job in jobs}


def _draw_alone(pipeline: Pipeline, job: Job) -> list[Tensor]:
    request, grid = job.request, pipeline.grids[drawn_size(pipeline, job.request)]
    options = request.sampler.model_dump() if request.sampler else {"name": "euler"}
    name, steps, guidance = options.pop("name"), request.steps or 1, request.guidance or 0.0
    sampler = pipeline.sampler(name, steps, guidance, grid=grid, **options)
    condition, _ = pipeline.condition(request.prompt, request.class_label)
    drawn = []
    for index in range(request.n):
        trajectory = pipeline.begin(sampler, condition, pipeline.noise((request.seed or 0) + index, grid))
        run(pipeline.denoiser, [trajectory])
        drawn.append(trajectory.state.x)
    return drawn


def largest_difference(rounds: list[Served], expected: list[Latents]) -> float:
    """Largest absolute difference between a served final latent and the expected one."""
    return max(
        float((found - wanted).abs().max())
        for served, latents in zip(rounds, expected, strict=True)
        for job, drawn in latents.items()
        for found, wanted in zip(served.latents[job], drawn, strict=True)
    )


def psnr_of_ours(
    pipelines: dict[str, Pipeline], traffics: list[list[Arrival]], ours: list[Served], dense: list[Served]
) -> float:
    """Median PSNR in dB of our pictures against dense evaluation with the same samplers; at most 60."""
    found = []
    for arrivals, *served in zip(traffics, ours, dense, strict=True):
        for arrival in arrivals:
            job = arrival.job(dense=False)
            pipeline = pipelines[job.request.model or ""]
            grid = pipeline.grids[drawn_size(pipeline, job.request)]
            a, b = (pipeline.decode(torch.stack(found.latents[job.id]), grid).float() for found in served)
            error = (a - b).square().flatten(1).mean(dim=1)
            found.append(10 * torch.log10(255**2 / error.clamp(min=255**2 / 1e6)))
    return float(torch.cat(found).median())

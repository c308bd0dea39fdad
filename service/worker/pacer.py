"""Applies the pace to running jobs: which pictures must cost less than usual, and how much less."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from patchforge.model.budget import expected_cost, expected_costs, lower
from patchforge.model.pipeline import Pipeline
from patchforge.service.messages.schemas import MAX_IMAGES
from patchforge.service.worker.live import LiveJob, LivePicture
from patchforge.service.worker.pace import DECAY, Allowance, Backlog, Speed, Work, shares

AIM = 0.6
"""Share of the target at which half of the answers are to be there under load. The slowest take half as long again."""
RECENT_SECONDS = 60.0
"""Older measurements refuse no request: otherwise a slow start could refuse all requests that would correct it."""

Key = tuple[str, int]
"""(job id, index of the picture)."""


class Pacer:
    """What a worker knows about its speed and its load, and what that means for the jobs that it runs."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        budgets: Mapping[str, int],
        floor: float,
        target: float | None = None,
    ) -> None:
        """`budgets`: most patches per evaluation of each model. `floor`: the share of its usual patch evaluations that
        load leaves a picture. `target`: how many times as long as alone a request may take before load lowers its
        quality; None: load never does.
        """
        self.target = target
        self.speeds = {name: Speed() for name in pipelines}
        self.floor = floor
        self.limits = dict(budgets)
        """Most patches of the next evaluation. While time is short, evaluations are smaller, and pictures finish one
        after another rather than all late."""
        self.backlogs: Mapping[str, Backlog] = {}
        """By model; empty while this worker has room for more jobs."""
        self._budgets = budgets
        self._usual = {name: _usual_costs(pipeline) for name, pipeline in pipelines.items()}
        self._least = {name: _usual_costs(each, floor) for name, each in pipelines.items()}
        self._measured = dict.fromkeys(pipelines, -math.inf)
        """When the speed of each model was last measured."""
        self._alone = dict.fromkeys(pipelines, 0.0)
        """Seconds that recent jobs of each model would have taken alone."""

    def admit(self, live: LiveJob, seconds: float) -> None:
        """Note how long a new job took to begin, and what it would take alone, if the speed is known."""
        speed = self.speeds[live.model]
        speed.began(seconds)
        if speed.known and not live.done:
            costs = [expected_costs(picture.trajectory, picture.unfinished) for picture in live.pictures]
            live.alone = speed.run([sum(step) for step in zip(*costs, strict=True)], len(costs))
            before = self._alone[live.model] or live.alone
            self._alone[live.model] = DECAY * before + (1 - DECAY) * live.alone

    def evaluated(self, model: str, patches: int, seconds: float, others: float, now: float) -> None:
        """Record an evaluation that ended at `now`; see `Speed.evaluated`."""
        self.speeds[model].evaluated(patches, seconds, others)
        self._measured[model] = now

    def allowances(self, jobs: Collection[LiveJob]) -> dict[Key, Allowance]:
        """Return what time allows, for the pictures that cannot have all that they would usually take."""
        if not any(live.may_be_lowered for live in jobs):
            self._limit(())
            return {}
        going = [(live, picture) for live in jobs for picture in live.pictures if not picture.done]
        costs = [expected_costs(picture.trajectory, picture.unfinished) for _, picture in going]
        packs = dict.fromkeys(self.speeds, 0.0)
        for (live, _), cost in zip(going, costs, strict=True):
            packs[live.model] += max(cost, default=0.0)
        rates = {name: self._rate(name, pack) for name, pack in packs.items()}
        gains = _gains([picture for _, picture in going])
        works = [
            self._work(live, picture, sum(cost), rates[live.model], gain)
            for (live, picture), cost, gain in zip(going, costs, gains, strict=True)
        ]
        found = shares([*works, *self._waiting(rates)])
        self._limit(rates if min(found, default=1.0) < 1 else ())
        allowed = {}
        for (live, picture), work, share in zip(going, works, found, strict=False):
            if share < 1:
                left = share * work.seconds - (self.speeds[live.model].decode or 0.0)
                patches = max(0.0, left / rates[live.model])
                allowed[live.job.id, picture.index] = Allowance(patches, self._may_land(live, picture, patches))
        return allowed

    def usual_seconds(self, model: str) -> float | None:
        """Seconds that a picture of the model's own choice takes alone; None: not known yet."""
        speed = self.speeds[model]
        return _rounded(speed.run(self._usual[model])) if speed.known else None

    def least_seconds(self, model: str, now: float) -> tuple[float, float] | None:
        """The least that a request takes at the floor: seconds of its first picture, and of each further one.

        The first one's seconds are after the jobs that wait at present. None: not known now.
        """
        if not self.speeds[model].known or now - self._measured[model] > RECENT_SECONDS:
            return None
        further = {name: self._least_further(name) for name, speed in self.speeds.items() if speed.known}
        waiting = sum(further.get(name, 0.0) * backlog.jobs for name, backlog in self.backlogs.items())
        return _rounded(self._least_together(model, 1) + waiting), _rounded(further[model])

    def _least_further(self, model: str) -> float:
        """Seconds that each further picture adds at least, if as many share evaluations as a request may have."""
        first, *more = (self._least_together(model, pictures) for pictures in range(1, MAX_IMAGES + 1))
        return min((seconds - first) / further for further, seconds in enumerate(more, 1))

    def _least_together(self, model: str, pictures: int) -> float:
        """Seconds of so many pictures at the floor that share evaluations, if nothing else runs."""
        evaluations: list[float] = []
        for cost in self._least[model]:
            pack = max(1, int(self._budgets[model] / cost))
            packs = [min(pack, pictures - done) for done in range(0, pictures, pack)]
            evaluations += [together * cost for together in packs]
        return self.speeds[model].run(evaluations, pictures)

    def _limit(self, short: Collection[str]) -> None:
        """Set the limits: smaller ones for models that are short of time."""
        for model, budget in self._budgets.items():
            self.limits[model] = self.speeds[model].smallest_pack(budget) if model in short else budget

    def _rate(self, model: str, pack: float) -> float:
        """Seconds per patch, if evaluations are as full as they can be with so many patches in all."""
        speed = self.speeds[model]
        return speed.drag * speed.per_patch(min(pack, self.limits[model])) if speed.known and pack else 0.0

    def _work(self, live: LiveJob, picture: LivePicture, patches: float, rate: float, gain: float) -> Work:
        seconds = picture.within_budget(patches) * rate + (self.speeds[live.model].decode or 0.0)
        due = live.due(None if self.target is None else AIM * self.target)
        return Work(seconds, due, rate > 0 and live.may_be_lowered and not picture.path, gain)

    def _waiting(self, rates: Mapping[str, float]) -> list[Work]:
        """The jobs that wait for a worker, as work."""
        works: list[Work] = []
        if self.target is not None:
            for model, backlog in self.backlogs.items():
                rate = rates.get(model) or (self._rate(model, self._budgets[model]) if model in self.speeds else 0.0)
                if rate:
                    seconds = sum(self._usual[model]) * rate + (self.speeds[model].decode or 0.0)
                    works += backlog.works(seconds, AIM * self.target * self._alone[model])
        return works

    def _may_land(self, live: LiveJob, picture: LivePicture, patches: float) -> bool:
        """Whether a picture can still be finished by its own time, if it is finished below the floor."""
        speed = self.speeds[live.model]
        first = 0.0 if picture.trajectory.state.evaluations else float(picture.trajectory.sampler.grid.patches)
        by = live.finish_in
        return by is not None and first <= patches and speed.run([first] if first else []) < by


def _gains(pictures: Sequence[LivePicture]) -> list[float]:
    """What more work brings each picture, 1 on average: the square root of the mean squared error of landing now.

    A picture that has not begun counts as average. Where errors shrink with the steps, this spends steps best.
    """
    errors = [
        float(((1 - each.times).square() * each.difficulty).mean().sqrt())
        if each.trajectory.state.evaluations
        else None
        for each in pictures
    ]
    known = [error for error in errors if error is not None and math.isfinite(error)]
    mean = sum(known) / len(known) if known else 0.0
    return [error / mean if mean and error is not None and math.isfinite(error) else 1.0 for error in errors]


def _usual_costs(pipeline: Pipeline, floor: float = 1.0) -> list[float]:
    """The patch evaluations that the model's own choice is expected to make in each step, or those at the floor."""
    defaults = pipeline.manifest.defaults
    options = defaults.sampler.model_dump()
    sampler = pipeline.sampler(options.pop("name"), defaults.steps, defaults.guidance, **options)
    trajectory = pipeline.begin(sampler, {}, pipeline.noise(0))
    patches = pipeline.grid.patches
    lower(trajectory, floor * expected_cost(trajectory, patches), patches)
    return expected_costs(trajectory, patches)


def _rounded(seconds: float) -> float:
    """Two digits: an announcement that changes is read again by every gateway."""
    return float(f"{seconds:.2g}") if math.isfinite(seconds) else 0.0

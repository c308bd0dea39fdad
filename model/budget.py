"""Keep a picture within a budget of patch evaluations: the rest in fewer, longer steps, and at its end a landing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from patchforge.model.errors import ParameterError
from patchforge.model.samplers import Adaptive, Sampler, SmallFirst, State
from patchforge.model.samplers.small_first import FEWEST_STEPS, is_small
from patchforge.model.trajectory import Change, Trajectory

SURVIVAL = 0.9
"""Share of the unfinished patches expected to be unfinished one step later, to forecast what a path costs."""
LEFT_AFTER_LOOK = 0.4
"""The same after the first look at an enlarged picture: 0.29 in `standard`, 0.72 in `high` (docs/samplers.md)."""
ROUNDING = 1e-9
FEWEST_GUIDED = 3
"""The outside judge finds two guided steps less like real pictures than three without guidance, for as much, and one
less than one without, for half. They are sharper all the same (docs/samplers.md)."""


def expected_costs(trajectory: Trajectory, unfinished: int) -> list[float]:
    """Forecast the patch evaluations of each evaluation to come, if `unfinished` patches still move now."""
    sampler, state = trajectory.sampler, trajectory.state
    ahead = sampler.costs_ahead(state, unfinished)
    if isinstance(sampler, Adaptive) and sampler.tolerance > 0:
        return _fewer_and_fewer(ahead, sampler, state)
    return [float(cost) for cost in ahead]


def expected_cost(trajectory: Trajectory, unfinished: int) -> float:
    """Forecast the patch evaluations to come."""
    return sum(expected_costs(trajectory, unfinished))


def lower(trajectory: Trajectory, most: float, unfinished: int) -> bool:
    """Change the path of a picture so that the rest is expected to cost at most `most` patch evaluations.

    If no path does, it takes the cheapest; unlike `fit`, it never lands, and costs more than `most` if patches finish
    later than expected. Tells whether it changed. Call it when `fit` may be called.
    """
    if expected_cost(trajectory, unfinished) <= most + ROUNDING:
        return False
    sampler, state, chosen = trajectory.sampler, trajectory.state, None
    steps_left = _most_steps(trajectory, sampler.costs_ahead(state, unfinished))
    for steps, guided in _shorter_ways(trajectory, steps_left):
        way = (sampler if guided else replace(sampler, guidance=1.0)).shorten(state, steps)
        if way is None:
            break
        chosen = Change(state.evaluations, steps, guided)
        if expected_cost(replace(trajectory, sampler=way[0], state=way[1]), unfinished) <= most:
            break
    if chosen is not None:
        trajectory.change(chosen)
    return chosen is not None


def fit(trajectory: Trajectory, left: float, unfinished: int) -> bool:
    """Change the path of a picture so that it costs at most `left` patch evaluations more; tell whether it changed.

    `unfinished` is the number of patches that still move. Call it before the first evaluation, and after each one once
    the next plan is known. If it changed the path, call `plan_next` again. It never takes more steps than the sampler
    would by itself. Uniform samplers keep their steps and land when the next one is too much.

    The path chosen before the first evaluation fits even if no patch finishes early, and so none has to: its tolerance
    is 0. It leaves out guidance rather than take fewer than `FEWEST_GUIDED` steps. If a sampler draws a small picture
    first, and no way fits that refines it, the picture ends as this one, enlarged.

    Raises:
        ParameterError: `left` is not enough for the first evaluation.
    """
    sampler, state = trajectory.sampler, trajectory.state
    ahead = sampler.costs_ahead(state, unfinished)
    if not ahead or sum(_fewer_and_fewer(ahead, sampler, state)) <= left:
        return False
    change = _way_that_fits(trajectory, left, unfinished, _most_steps(trajectory, ahead))
    begins_small = is_small(state) and not state.evaluations
    if change is None and begins_small and left >= unfinished:
        if trajectory.changes:
            return False  # the small picture fits
        change = _way_that_ends_small(trajectory, left, unfinished)
    if change is not None:
        trajectory.change(change)
        return True
    only_lands = not begins_small and sampler.shorten(state, 1) is None
    if only_lands and ahead[0] <= left:
        return False
    if not state.evaluations:
        needed = ahead[0] if only_lands else unfinished
        raise ParameterError("budget", f"must be at least {needed} patch evaluations for one look at every patch")
    trajectory.change(Change(state.evaluations, 0))
    return True


def fit_all(trajectories: Sequence[Trajectory], budget: int) -> bool:
    """`fit` each picture to `budget` patch evaluations in all; tell whether any changed."""
    changed = False
    for each in trajectories:
        unfinished = int((each.state.times < 1).sum())
        changed |= unfinished > 0 and fit(each, budget - each.patch_evaluations, unfinished)
    return changed


def replay(trajectory: Trajectory, changes: Sequence[Change]) -> bool:
    """Make the next change of an earlier run if that made it after as many evaluations; tell whether it did.

    Call `plan_next` afterwards, and then this again: a change may have followed another.
    """
    made = len(trajectory.changes)
    if made == len(changes) or changes[made].evaluation != trajectory.state.evaluations:
        return False
    trajectory.change(changes[made])
    return True


def check_path(trajectory: Trajectory, changes: Sequence[Change]) -> None:
    """Check that a picture can take the path of an earlier run.

    Raises:
        ParameterError: it changes its steps while the picture is small.
    """
    sampler: Sampler[Any] = trajectory.sampler
    if isinstance(sampler, SmallFirst) and is_small(trajectory.state):
        for change in changes:
            if change.evaluation == 0:
                sampler = replace(sampler, steps=change.steps) if change.steps >= FEWEST_STEPS else sampler
            elif change.steps and change.evaluation <= sampler.last_small:
                raise ParameterError("path", "has other steps from where the picture is still small; see `small_until`")


def _most_steps(trajectory: Trajectory, ahead: list[int]) -> int:
    """Steps of the rest of the way. The evaluations `ahead` are one more while the picture is small."""
    return trajectory.sampler.steps if is_small(trajectory.state) else len(ahead)


def _shorter_ways(trajectory: Trajectory, steps: int) -> list[tuple[int, bool]]:
    """List the ways to go on in at most `steps` steps, as (steps, guided), the best first."""
    if trajectory.state.evaluations or trajectory.sampler.guidance == 1:
        return [(fewer, True) for fewer in range(steps - 1, 0, -1)]
    guided = [(fewer, True) for fewer in range(steps - 1, FEWEST_GUIDED - 1, -1)]
    return guided + [(fewer, False) for fewer in range(steps, 0, -1)]


def _way_that_fits(trajectory: Trajectory, left: float, unfinished: int, most: int) -> Change | None:
    """The best way in at most `most` steps that costs at most `left`; None: none does."""
    sampler, state = trajectory.sampler, trajectory.state
    for steps, guided in _shorter_ways(trajectory, most):
        shorter = (sampler if guided else replace(sampler, guidance=1.0)).shorten(state, steps)
        if shorter is None:
            break
        costs = shorter[0].costs_ahead(shorter[1], unfinished)
        if sum(_fewer_and_fewer(costs, *shorter) if state.evaluations else costs) <= left:
            tolerance = None if state.evaluations or not isinstance(sampler, Adaptive) else 0.0
            return Change(state.evaluations, steps, guided, tolerance)
    return None


def _way_that_ends_small(trajectory: Trajectory, left: float, unfinished: int) -> Change | None:
    """The way with the best small picture that fits. It is only enlarged, because nothing is left to refine it."""
    sampler = trajectory.sampler
    if not isinstance(sampler, SmallFirst):
        return None
    for steps, guided in _shorter_ways(trajectory, sampler.steps):
        if steps < FEWEST_STEPS:
            continue
        way = replace(sampler, steps=steps, guidance=sampler.guidance if guided else 1.0)
        if way.small_cost(unfinished) <= left:
            return Change(0, steps, guided, 0.0)
    return None


def _fewer_and_fewer(ahead: list[int], sampler: Sampler[Any], state: State) -> list[float]:
    """What each evaluation to come is expected to cost, of what it costs at most, since patches finish."""
    first = sampler.until_full(state) if isinstance(sampler, SmallFirst) else 0
    later = LEFT_AFTER_LOOK if first else 1.0
    return [
        cost if number < first else cost * later * SURVIVAL ** (number - first) for number, cost in enumerate(ahead)
    ]

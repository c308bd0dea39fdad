"""Keep a picture within a budget of patch evaluations: the rest in fewer, longer steps, and at its end a landing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchforge.model.errors import ParameterError
from patchforge.model.samplers import Adaptive, SmallFirst
from patchforge.model.samplers.small_first import is_small
from patchforge.model.trajectory import Change, Trajectory

SURVIVAL = 0.9
"""Share of the unfinished patches expected to be unfinished one step later, to forecast what a path costs."""
ROUNDING = 1e-9
FEWEST_SMALL = 2
"""A small picture that comes from fewer steps before the last is not worth refining."""
FEWEST_GUIDED = 3
"""The outside judge finds two guided steps less like real pictures than three without guidance, for as much, and one
less than one without, for half. They are sharper all the same (docs/samplers.md)."""


def expected_costs(trajectory: Trajectory, unfinished: int) -> list[float]:
    """Forecast the patch evaluations of each evaluation to come, if `unfinished` patches still move now."""
    sampler = trajectory.sampler
    survival = SURVIVAL if isinstance(sampler, Adaptive) and sampler.tolerance > 0 else 1.0
    ahead = sampler.costs_ahead(trajectory.state, unfinished)
    return [cost * survival**number for number, cost in enumerate(ahead)]


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
    for steps, guided in _shorter_ways(trajectory, len(sampler.costs_ahead(state, unfinished))):
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
    if not ahead or _forecast(ahead) <= left:
        return False
    change = _way_that_fits(trajectory, left, unfinished, len(ahead))
    if change is None and not state.evaluations and is_small(state) and left >= unfinished:
        if trajectory.changes:
            return False  # the small picture fits
        change = _way_that_ends_small(trajectory, left, unfinished)
    if change is not None:
        trajectory.change(change)
        return True
    only_lands = sampler.shorten(state, 1) is None
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
        if (
            isinstance(sampler, SmallFirst)
            and is_small(state)
            and replace(sampler, steps=steps).last_small < FEWEST_SMALL
        ):
            continue
        costs = shorter[0].costs_ahead(shorter[1], unfinished)
        if (_forecast(costs) if state.evaluations else sum(costs)) <= left:
            tolerance = None if state.evaluations or not isinstance(sampler, Adaptive) else 0.0
            return Change(state.evaluations, steps, guided, tolerance)
    return None


def _way_that_ends_small(trajectory: Trajectory, left: float, unfinished: int) -> Change | None:
    """The way with the best small picture that fits. It is only enlarged, because nothing is left to refine it."""
    sampler = trajectory.sampler
    if not isinstance(sampler, SmallFirst):
        return None
    for steps, guided in _shorter_ways(trajectory, sampler.evaluations):
        way = replace(sampler, steps=steps, guidance=sampler.guidance if guided else 1.0)
        enough = way.last_small >= FEWEST_SMALL or way.guidance == 1
        if enough and way.small_cost(unfinished) <= left:
            return Change(0, steps, guided, 0.0)
    return None


def _forecast(ahead: list[int]) -> float:
    return sum(cost * SURVIVAL**number for number, cost in enumerate(ahead))

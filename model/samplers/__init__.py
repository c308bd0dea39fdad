"""The samplers, by the names that users give."""

from __future__ import annotations

import inspect
from typing import Any

from patchforge.model.errors import ParameterError
from patchforge.model.samplers.adaptive import Adaptive
from patchforge.model.samplers.base import Sampler, State
from patchforge.model.samplers.dual_loop import DualLoop
from patchforge.model.samplers.euler import Euler
from patchforge.model.samplers.heun import Heun
from patchforge.model.samplers.look_ahead import LookAhead
from patchforge.model.samplers.multistep import Multistep
from patchforge.model.samplers.small_first import FEWEST_STEPS, SmallFirst, check_small_until
from patchforge.model.types import Grid

SAMPLERS: dict[str, type[Sampler[Any]]] = {
    "adaptive": Adaptive,
    "euler": Euler,
    "heun": Heun,
    "multistep": Multistep,
    "dual_loop": DualLoop,
    "look_ahead": LookAhead,
}

__all__ = [
    "SAMPLERS",
    "Adaptive",
    "DualLoop",
    "Euler",
    "Heun",
    "LookAhead",
    "Multistep",
    "Sampler",
    "SmallFirst",
    "State",
    "make_sampler",
]


def make_sampler(name: str, grid: Grid, steps: int, guidance: float, **options: Any) -> Sampler[Any]:
    """Make a sampler. `adaptive` with `small_until` above 0 is `SmallFirst`, unless its steps are too few.

    Raises:
        ParameterError: no such sampler, no such option, or a value is out of range.
    """
    if name not in SAMPLERS:
        raise ParameterError("sampler", f"unknown: {name!r}; available: {', '.join(SAMPLERS)}")
    kind = SAMPLERS[name]
    if name == "adaptive" and "small_until" in options:
        check_small_until(options["small_until"])
        if options["small_until"] and steps >= FEWEST_STEPS:
            kind = SmallFirst
        else:
            del options["small_until"]
    taken = set(inspect.signature(kind).parameters)
    for option in options:
        if option not in taken:
            raise ParameterError(option, f"not an option of {name}")
    return kind(grid=grid, steps=steps, guidance=guidance, **options)

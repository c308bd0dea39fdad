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
    "State",
    "make_sampler",
]


def make_sampler(name: str, grid: Grid, steps: int, guidance: float, **options: Any) -> Sampler[Any]:
    """Make a sampler.

    Raises:
        ParameterError: no such sampler, no such option, or a value is out of range.
    """
    if name not in SAMPLERS:
        raise ParameterError("sampler", f"unknown: {name!r}; available: {', '.join(SAMPLERS)}")
    taken = set(inspect.signature(SAMPLERS[name]).parameters)
    for option in options:
        if option not in taken:
            raise ParameterError(option, f"not an option of {name}")
    return SAMPLERS[name](grid=grid, steps=steps, guidance=guidance, **options)

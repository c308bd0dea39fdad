"""The samplers, by the names users give."""

from __future__ import annotations

import inspect
from typing import Any

from model.errors import ParameterError
from model.samplers.adaptive import Adaptive
from model.samplers.base import Sampler, State
from model.samplers.dual_loop import DualLoop
from model.samplers.euler import Euler
from model.samplers.heun import Heun
from model.samplers.look_ahead import LookAhead
from model.samplers.multistep import Multistep
from model.types import Grid

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
    """A sampler by name.

    Raises:
        ParameterError: no such sampler, an option it does not take, or a value out of range.
    """
    if name not in SAMPLERS:
        raise ParameterError("sampler", f"unknown: {name!r}; there are {', '.join(SAMPLERS)}")
    taken = set(inspect.signature(SAMPLERS[name]).parameters)
    for option in options:
        if option not in taken:
            raise ParameterError(option, f"not an option of {name}")
    return SAMPLERS[name](grid=grid, steps=steps, guidance=guidance, **options)

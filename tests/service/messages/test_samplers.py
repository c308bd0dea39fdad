"""The service's samplers are the engine's: same names, same options, same bounds at the defaults."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from pydantic import BaseModel

from patchforge.model.samplers import SAMPLERS as ENGINE
from patchforge.model.samplers import make_sampler
from patchforge.model.types import Grid
from patchforge.service.messages import samplers as sampler_options

SERVED: tuple[type[BaseModel], ...] = get_args(get_args(sampler_options.Sampler)[0])
COMMON = {"grid", "steps", "guidance"}


def test_the_names_agree() -> None:
    assert set(sampler_options.SAMPLERS) == set(ENGINE) == {served.model_fields["name"].default for served in SERVED}


@pytest.mark.parametrize("served", SERVED, ids=lambda served: served.__name__)
def test_the_options_and_their_defaults_agree(served: type[BaseModel]) -> None:
    given = served().model_dump()
    name = given.pop("name")
    taken = {
        key: parameter.default
        for key, parameter in inspect.signature(ENGINE[name]).parameters.items()
        if key not in COMMON
    }
    assert given == taken
    make_sampler(name, Grid(4, 4, 2, 3), steps=3, guidance=1.0, **given)

"""What tests of the evaluation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from patchforge.model.evaluation import outside


@pytest.fixture(scope="module", autouse=True)
def small_looks() -> Iterator[None]:
    """The outside judge sees pictures smaller than in its training: that takes a fifth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "SIDE", 96)
        yield

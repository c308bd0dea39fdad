"""The budget of an evaluation: as much as is quick enough and costs a patch no more."""

import pytest

from model.pipeline import Pipeline
from service.settings import Settings
from service.worker import budgets
from service.worker.budgets import Measured, largest_good, profile
from service.worker.main import find_budgets


def curve(overhead: float, per_patch: float) -> list[Measured]:
    """A device that takes so long for any evaluation, and so long for each patch on top."""
    return [Measured(patches, overhead + per_patch * patches) for patches in (128, 256, 512, 1024, 2048, 4096)]


def test_the_largest_pack_that_is_quick_and_no_slower_a_patch_is_best() -> None:
    assert largest_good(curve(0.0, 1e-5)) == 4096
    assert largest_good(curve(0.01, 1e-5)) == 4096
    assert largest_good([*curve(0.0, 1e-5), Measured(8192, 0.09)]) == 4096  # out of the device's cache


def test_no_pack_makes_newcomers_wait_long_unless_one_picture_does() -> None:
    assert largest_good(curve(0.01, 1e-4)) == 512  # 61 ms; twice as many are better by 9 % and take 112
    assert largest_good(curve(0.5, 1e-4)) == 128


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_the_profile_measures_growing_packs_of_guided_pictures(
    pipelines: dict[str, Pipeline], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "SECONDS", 0.0)
    monkeypatch.setattr(budgets, "MOST_PATCHES", 256)
    measured = profile(pipelines[name])
    assert [each.patches for each in measured] == [32, 64, 128, 256]
    assert all(each.seconds > 0 for each in measured)


def test_what_is_set_is_not_measured(pipelines: dict[str, Pipeline]) -> None:
    assert find_budgets(Settings(patch_budget=77), pipelines) == {"tiny-class": 77, "tiny-text": 77}

"""The budget of an evaluation: as large as possible while it is fast, with nearly the best throughput."""

import pytest

from patchforge.model.denoiser import Denoiser, Evaluation
from patchforge.model.pipeline import Pipeline
from patchforge.model.types import Prediction
from patchforge.service.settings import Settings
from patchforge.service.worker import budgets
from patchforge.service.worker.budgets import Measured, largest_good, profile
from patchforge.service.worker.main import find_budgets


def curve(overhead: float, per_patch: float) -> list[Measured]:
    """A device with a fixed time per evaluation, and a time per patch."""
    return [Measured(patches, overhead + per_patch * patches) for patches in (128, 256, 512, 1024, 2048, 4096)]


def test_the_largest_pack_that_is_quick_and_no_slower_a_patch_is_best() -> None:
    assert largest_good(curve(0.0, 1e-5)) == 4096
    assert largest_good(curve(0.01, 1e-5)) == 4096
    assert largest_good([*curve(0.0, 1e-5), Measured(8192, 0.09)]) == 4096  # 8192 no longer fit into the cache


def test_no_pack_makes_newcomers_wait_long_unless_one_picture_does() -> None:
    assert largest_good(curve(0.01, 1e-4)) == 512  # 61 ms; 1024 are better by 9 %, but take 112 ms
    assert largest_good(curve(0.5, 1e-4)) == 128


class Device:
    """A clock that advances only during evaluations, by a fixed time per picture."""

    def __init__(self, denoiser: Denoiser, a_picture: float, patch: pytest.MonkeyPatch) -> None:
        self.now, self.packs = 0.0, list[int]()
        evaluate = denoiser.evaluate

        def evaluated(evaluations: list[Evaluation]) -> list[Prediction]:
            self.packs.append(len(evaluations))
            self.now += a_picture * len(evaluations)
            return evaluate(evaluations)

        patch.setattr(denoiser, "evaluate", evaluated)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_the_profile_measures_growing_packs_of_guided_pictures(
    pipelines: dict[str, Pipeline], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "MOST_PATCHES", 256)
    device = Device(pipelines[name].denoiser, 0.0125, monkeypatch)
    measured = profile(pipelines[name], device.clock)
    assert [each.patches for each in measured] == [32, 64, 128, 256]
    assert [each.seconds for each in measured] == pytest.approx([0.0125, 0.025, 0.05, 0.1])
    assert device.packs == [1] + 11 * [1, 2, 4, 8], "0.19 s a round, until 2 s are over"


def test_the_profile_tries_nothing_larger_than_what_is_no_longer_quick(
    pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(pipelines["tiny-class"].denoiser, 0.04, monkeypatch)
    assert [each.patches for each in profile(pipelines["tiny-class"], device.clock)] == [32, 64, 128]


@pytest.mark.parametrize(("peak", "compiled", "packs"), [(1e6, False, 2), (1.0, False, 0), (1.0, True, 1)])
def test_a_network_that_takes_too_long_for_one_picture_is_not_evaluated_before_it_serves(
    pipelines: dict[str, Pipeline], peak: float, compiled: bool, packs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "patch_flops", lambda manifest: 1e9)  # 32 GFLOP a picture
    monkeypatch.setattr(budgets, "matmul_peak", lambda device, dtype, side: peak)
    monkeypatch.setattr(budgets, "is_compiled", lambda network: compiled)
    monkeypatch.setattr(budgets, "SECONDS", 0.0)
    monkeypatch.setattr(budgets, "MOST_PATCHES", 32)
    device = Device(pipelines["tiny-class"].denoiser, 0.05, monkeypatch)
    assert budgets.patch_budget(pipelines["tiny-class"], device.clock) == 32
    assert device.packs == packs * [1]


def test_what_is_set_is_not_measured(pipelines: dict[str, Pipeline]) -> None:
    assert find_budgets(Settings(patch_budget=77), pipelines) == {"tiny-class": 77, "tiny-text": 77}

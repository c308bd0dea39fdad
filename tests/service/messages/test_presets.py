"""How a preset changes a model's defaults."""

from __future__ import annotations

import pytest

from patchforge.service.messages.samplers import MAX_STEPS, UNTUNED, Adaptive, Euler, Quality, preset

TUNED = Adaptive(order=1, tolerance=0.12, skip_tolerance=0.03, guidance_from=0.25, guidance_until=0.75)


def test_standard_is_the_models_own_choice() -> None:
    assert preset(Quality.STANDARD, TUNED, 5) == (TUNED, 5)


@pytest.mark.parametrize(
    ("quality", "steps", "changed"),
    [
        (Quality.DRAFT, 6, {"tolerance": 0.18}),
        (Quality.HIGH, 16, {"order": 2, "tolerance": 0.03, "guidance_from": 0.125}),
    ],
)
def test_the_others_are_coarser_and_finer(quality: Quality, steps: int, changed: dict[str, float]) -> None:
    assert preset(quality, TUNED, 8) == (TUNED.model_copy(update=changed), steps)


def test_where_the_model_chose_another_sampler_its_steps_say_nothing() -> None:
    assert preset(Quality.STANDARD, Euler(), 50) == UNTUNED
    assert preset(Quality.HIGH, Euler(), 50)[1] == 2 * UNTUNED[1]


def test_the_tolerance_stays_what_a_request_may_ask_for() -> None:
    loose = TUNED.model_copy(update={"tolerance": 8.0})
    assert preset(Quality.DRAFT, loose, 4)[0].tolerance == 10


def test_steps_stay_what_a_request_may_ask_for() -> None:
    assert [preset(quality, TUNED, 1)[1] for quality in Quality] == [1, 1, 2]
    assert [preset(quality, TUNED, MAX_STEPS)[1] for quality in Quality] == [150, MAX_STEPS, MAX_STEPS]

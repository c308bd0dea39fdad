"""How timesteps are drawn. `test_golden` compares LTG with the paper's."""

from __future__ import annotations

import pytest
import torch

from patchforge.model.training.timesteps import LTG, SCHEDULES


def test_some_samples_have_one_time_and_some_patches_are_clean() -> None:
    generator = torch.Generator().manual_seed(0)
    times = LTG(loc=0.5, together=0.25, clean=0.1).sample(4000, 16, generator)
    alike = (times.amax(1) == times.amin(1)).float().mean()
    assert 0.2 < alike < 0.3
    assert 0.03 < (times == 1).float().mean() < 0.08


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_draws_times_of_patches(name: str) -> None:
    times = SCHEDULES[name].sample(4000, 16, torch.Generator().manual_seed(0))
    assert times.shape == (4000, 16)
    assert times.min() >= 0
    assert times.max() <= 1
    assert torch.equal(times, SCHEDULES[name].sample(4000, 16, torch.Generator().manual_seed(0)))


def test_schedules_differ_in_what_a_sample_shows_at_most() -> None:
    times = {name: each.sample(4000, 64, torch.Generator().manual_seed(0)) for name, each in SCHEDULES.items()}
    assert torch.equal(times["sit"].amin(1), times["sit"].amax(1))
    clear = {name: (each.amax(1) > 0.95).float().mean().item() for name, each in times.items()}
    assert clear["uniform"] > 0.95  # nearly every sample has an almost clean patch;
    assert clear["ltg"] < 0.05  # the paper's schedule prevents that
    within = times["mean"].mean(dim=1)
    assert within.std() > 0.15  # the mean is drawn per sample;
    assert times["uniform"].mean(dim=1).std() < 0.05  # with independent patches it is nearly constant
    assert (times["mean"] - within[:, None]).abs().amax(1).gt(0.05).float().mean() > 0.9

"""Serving on another device than the CPU: all tensors are on the right device, and steps rarely wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchforge.model.device import upload
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import SAMPLERS
from patchforge.model.trajectory import Trajectory, run
from tests.pretend_device import PRETENDED, PretendDevice

WORDS = {"tiny-class": ["cat", "dog"], "tiny-text": ["a red apple", "rain"]}
STEPS = 4
WAITS = {
    "dual_loop": STEPS,  # the easy patches decide what is evaluated next
    "adaptive": STEPS - 1,  # each step decides the next; the last has no next
}
"""Waits for the device, for samplers that wait at all. One wait serves all pictures."""


def begin(pipeline: Pipeline, sampler: str) -> list[Trajectory]:
    chosen = pipeline.default_sampler(sampler, STEPS)
    conditions = [pipeline.condition_on(words) for words in WORDS[pipeline.manifest.name]]
    return [Trajectory.begin(chosen, condition, pipeline.noise(seed)) for seed, condition in enumerate(conditions)]


def pictures(pipeline: Pipeline, runs: list[Trajectory]) -> Tensor:
    return pipeline.decode(torch.stack([each.state.x for each in runs]))


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_it_draws_on_the_cpu_and_waits_no_more_than_it_must(
    pipelines: dict[str, Pipeline], bundle_dir: Path, pretend_device: PretendDevice, kind: str, sampler: str
) -> None:
    there, here = Pipeline.open(bundle_dir / kind, PRETENDED), pipelines[kind]
    runs, expected = begin(there, sampler), begin(here, sampler)
    pretend_device.waits.clear()
    run(there.denoiser, runs)
    assert pretend_device.waits.total() == WAITS.get(sampler, 0)
    run(here.denoiser, expected)
    assert all(each.state.x.device == PRETENDED for each in runs)
    made, wanted = pictures(there, runs).int(), pictures(here, expected).int()
    assert (made - wanted).abs().max() <= 1
    assert (made[0] - made[1]).abs().max() > 10, "the two are different pictures"


def test_a_picture_to_start_from_is_encoded_there(
    pipelines: dict[str, Pipeline], bundle_dir: Path, pretend_device: PretendDevice
) -> None:
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    there = Pipeline.open(bundle_dir / "tiny-class", PRETENDED)
    encoded = there.encode(images)
    assert encoded.device == PRETENDED
    torch.testing.assert_close(encoded.cpu(), pipelines["tiny-class"].encode(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda there: there + torch.ones(3),
        lambda there: there.index_select(0, torch.tensor([0])),
        lambda there: there.index_copy(0, torch.tensor([0]), there[:1]),
        lambda there: there * torch.tensor([1.0, 2.0, 3.0], device=there.device),
    ],
)
def test_the_pretended_device_refuses_what_a_gpu_refuses_or_waits_for(
    pretend_device: PretendDevice, mistake: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(AssertionError, match="sees"):
        mistake(torch.ones(3).to(PRETENDED))


@pytest.mark.parametrize(
    ("waits", "look"),
    [
        (1, lambda there: there.to(torch.device("cpu"))),
        (1, lambda there: there.sum().item()),
        (1, lambda there: bool((there > 0).any())),
        (1, lambda there: there.nonzero()),
        (1, lambda there: there[there > 0]),
        (1, lambda there: torch.ones(3).to(there.device)),
        (1, lambda there: there.copy_(torch.ones(3))),
        (0, lambda there: upload(torch.ones(3), there.device)),
        (0, lambda there: there.to(torch.float64)),
        (0, lambda there: there.clone().copy_(there)),
        (0, lambda there: torch.where(there > 0, there, 2.0)[upload(torch.tensor([1]), there.device)]),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_the_pretended_device_tells_what_waits(
    pretend_device: PretendDevice, waits: int, look: Callable[[Tensor], object], inference: bool
) -> None:
    with torch.inference_mode(inference):
        there = upload(torch.tensor([0.0, 1.0, 2.0]), PRETENDED)
        look(there)
    assert pretend_device.waits.total() == waits

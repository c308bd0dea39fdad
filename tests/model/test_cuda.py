"""On CUDA, if available: the shipped models make the same pictures as on a CPU, within bf16's precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchforge.model.experiments.sampler_bench import picture_psnr
from patchforge.model.pipeline import Pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BUNDLES = Path(__file__).parents[2] / "model" / "bundles"
PROMPTS = ["red apple", "grinning face"]
CLASSES = ["food-fruit", "cat-face"]
WORDS = {"emoji-text": PROMPTS, "emoji-class": CLASSES}
SAMPLERS = [("adaptive", 8), ("multistep", 8), ("heun", 4), ("euler", 8), ("dual_loop", 4), ("look_ahead", 8)]
LEAST_PSNR = 25.0
"""PSNR in dB between the devices' pictures. bf16 emulated on a CPU gives more than 39, another seed less than 21."""


@pytest.fixture(scope="module", params=sorted(WORDS))
def both(request: pytest.FixtureRequest) -> tuple[Pipeline, Pipeline]:
    """The same bundle on the CPU and on the GPU."""
    folder = BUNDLES / request.param
    return Pipeline.open(folder, torch.device("cpu")), Pipeline.open(folder, torch.device("cuda"))


@pytest.mark.parametrize(("name", "steps"), SAMPLERS)
def test_both_devices_make_the_same_pictures(both: tuple[Pipeline, Pipeline], name: str, steps: int) -> None:
    pictures = []
    for pipeline in both:
        words = WORDS[pipeline.manifest.name]
        conditions = [pipeline.condition_on(each) for each in words]
        sampler = pipeline.default_sampler(name, steps)
        made, _ = pipeline.sample(sampler, conditions, list(range(len(words))))
        pictures.append(made)
    assert picture_psnr(pictures[1], pictures[0]) > LEAST_PSNR

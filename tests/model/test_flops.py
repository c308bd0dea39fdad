"""The computed FLOPs of a patch equal those that PyTorch counts while the network runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchforge.model.denoiser import Evaluation, Memory
from patchforge.model.flops import patch_flops
from patchforge.model.networks.row_wise import ROW_BLOCK
from patchforge.model.parallel import here
from patchforge.model.pipeline import Pipeline
from patchforge.model.types import Plan


def counted(pipeline: Pipeline, evaluations: list[Evaluation]) -> int:
    """Count the FLOPs of these evaluations, in this thread and with plain attention: the counter sees nothing else."""
    with here(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pipeline.denoiser.evaluate(evaluations)
    return counter.get_total_flops()


def evaluation(pipeline: Pipeline, plan: Plan) -> Evaluation:
    words = "cat" if pipeline.manifest.class_names else "a cat"
    return Evaluation(plan, pipeline.condition_on(words), Memory())


def a_plan(pipeline: Pipeline) -> Plan:
    return Plan(pipeline.noise(1), times=(0.5,), keep=True)


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_another_picture_costs_its_patches_and_nothing_else(pipelines: dict[str, Pipeline], name: str) -> None:
    """Pictures at the same time share their conditioning, so the difference is the cost of patches alone."""
    pipeline = pipelines[name]
    one = [evaluation(pipeline, a_plan(pipeline))]
    two = [*one, replace(one[0], memory=Memory())]
    difference = counted(pipeline, two) - counted(pipeline, one)
    assert difference == pipeline.grid.patches * patch_flops(pipeline.manifest)


@pytest.mark.parametrize("name", ["tiny-class", "tiny-text"])
def test_a_patch_costs_the_same_when_others_are_cached(pipelines: dict[str, Pipeline], name: str) -> None:
    pipeline = pipelines[name]
    dense = evaluation(pipeline, a_plan(pipeline))
    counted(pipeline, [dense])  # fills the cache
    few = [replace(dense, plan=replace(dense.plan, keep=False, patches=torch.arange(count))) for count in (4, 12)]
    # Several pictures, so that the rows are whole blocks: others would be padded.
    fewer, more = (counted(pipeline, [each] * (ROW_BLOCK // 4)) for each in few)
    assert more - fewer == 8 * ROW_BLOCK // 4 * patch_flops(pipeline.manifest)

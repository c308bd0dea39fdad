"""The paper's form of an evaluation, our baseline: same predictions, one condition per patch."""

from __future__ import annotations

import torch

from patchforge.model.experiments.paper_forward import as_the_paper
from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import Trajectory, run


def test_conditioning_each_patch_by_itself_changes_nothing_but_cost(pipelines: dict[str, Pipeline]) -> None:
    for name, (prompt, label) in {"tiny-class": (None, "cat"), "tiny-text": ("a cat", None)}.items():
        pipeline = pipelines[name]
        paper = as_the_paper(pipeline)
        calls: list[int] = []
        embedder = pipeline.network.t_embedder
        hook = embedder.register_forward_hook(lambda module, given, made, calls=calls: calls.append(len(given[0])))
        made = []
        for denoiser in (pipeline.denoiser, paper.denoiser):
            sampler = pipeline.sampler("dual_loop", 2, 2.0, quantile=0.4, inner_steps=3)
            condition, _ = pipeline.condition(prompt, label)
            trajectory = Trajectory(sampler, condition, sampler.start(pipeline.noise(1)))
            run(denoiser, [trajectory])
            made.append(trajectory.state.x)
        hook.remove()
        torch.testing.assert_close(made[0], made[1], atol=1e-4, rtol=0)
        ours, theirs = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        assert max(ours) <= 4  # two times, and for classes two labels
        assert max(theirs) == 2 * pipeline.grid.patches

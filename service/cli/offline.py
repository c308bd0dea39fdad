"""Draws pictures without a server: the worker's samplers and denoiser in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import Progress, TaskID

from patchforge.model.device import prepare_cpu
from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import Trajectory
from patchforge.service.cli.album import Wanted
from patchforge.service.cli.drawing import Drawn, update_line
from patchforge.service.client.results import Picture

PORTION = 16
"""Pictures drawn together: more gain little and need more memory."""


def draw_offline(
    bundle: Path,
    wanted: Sequence[Wanted],
    progress: Progress,
    keep: Callable[[Drawn], None],
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    budget: int | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
    metadata: bool = True,
) -> None:
    """Draw pictures, some at a time, and give each to `keep` as soon as it is finished.

    For a class-conditional model the prompts are class names. `progress` must be on screen already.

    Raises:
        BundleError: the bundle cannot be loaded.
        ParameterError: an option is out of range, a class is unknown, or the model was not trained at the size.
    """
    prepare_cpu(None, only_pictures=True)
    pipeline = Pipeline.open(bundle)
    for prompt in dict.fromkeys(each.prompt for each in wanted):
        pipeline.condition_on(prompt, negative_prompt)  # an unknown class ends the command before anything is drawn
    for start in range(0, len(wanted), PORTION):
        portion = wanted[start : start + PORTION]
        lines = [progress.add_task(each.prompt, total=1.0, state="drawing") for each in portion]
        made = pipeline.generate(
            [each.prompt for each in portion],
            seed=[each.seed for each in portion],
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            budget=budget,
            negative_prompt=negative_prompt,
            size=size,
            after_step=_progress_of(progress, lines),
        )
        for each, picture in zip(portion, made.pictures, strict=True):
            data = picture.encode("PNG", metadata=metadata)
            truncated = pipeline.is_truncated(each.prompt) or pipeline.is_truncated(negative_prompt)
            keep(Drawn(each, Picture(data, "image/png", each.seed), picture.report.savings_ratio, truncated))
        for line in lines:
            progress.remove_task(line)


def _progress_of(progress: Progress, lines: Sequence[TaskID]) -> Callable[[list[Trajectory]], None]:
    line_of_run: dict[int, TaskID] = {}

    def show(runs: list[Trajectory]) -> None:
        if not line_of_run:  # the first call has all runs in order; later calls have only the unfinished runs
            line_of_run.update(zip(map(id, runs), lines, strict=True))
        for run in runs:
            finished = (run.state.times >= 1).float().mean().item()
            update_line(progress, line_of_run[id(run)], run.state.evaluations / run.evaluations, finished)

    return show

"""Pictures without a server: the worker's samplers and denoiser in a plain loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from rich.progress import TaskID

from model.generate import Trajectory
from model.pipeline import Pipeline
from service.files import picture_path
from service.progress import add_line, generation_progress, show_share


def generate_files(
    bundle: Path,
    prompts: Sequence[str],
    out: Path,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Iterator[tuple[Path, float]]:
    """One PNG a prompt (a class name, for a class-conditional model), all made together from the same seed.

    Yields (file, share of the dense run's patch evaluations saved).

    Raises:
        BundleError: the bundle cannot be loaded.
        ParameterError: an option out of range, or an unknown class.
    """
    pipeline = Pipeline.open(bundle)
    chosen = pipeline.default_sampler(sampler, steps, guidance)
    conditions = [pipeline.condition_on(prompt) for prompt in prompts]
    with generation_progress() as progress:
        lines = [add_line(progress, prompt, "drawing") for prompt in prompts]
        lines_of: dict[int, TaskID] = {}

        def show(runs: list[Trajectory]) -> None:
            if not lines_of:  # the first time, all of them are there, in order; later, those that are not finished
                lines_of.update(zip(map(id, runs), lines, strict=True))
            for run in runs:
                finished = (run.state.times >= 1).float().mean().item()
                show_share(progress, lines_of[id(run)], run.state.evaluations / chosen.evaluations, finished)

        pictures, runs = pipeline.generate(chosen, conditions, [seed] * len(prompts), show)
    out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture, run) in enumerate(zip(prompts, pictures, runs, strict=True)):
        path = picture_path(out, number, prompt, seed)
        Image.fromarray(picture.numpy()).save(path)
        yield path, 1 - run.patch_evaluations / chosen.dense_patch_evaluations

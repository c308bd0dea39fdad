"""Pictures without a server: the worker's samplers and denoiser in a plain loop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from model.pipeline import Pipeline
from model.training.progress import progress_bar


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
    with progress_bar() as bar:
        task = bar.add_task("generating", total=chosen.evaluations)
        pictures, runs = pipeline.generate(
            chosen, conditions, [seed] * len(prompts), lambda _: bar.update(task, advance=1)
        )
    out.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture, run) in enumerate(zip(prompts, pictures, runs, strict=True)):
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
        path = out / f"{number:02d}-{name}-{seed}.png"
        Image.fromarray(picture.numpy()).save(path)
        yield path, 1 - run.patch_evaluations / chosen.dense_patch_evaluations

"""`patchforge bench recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import check_names, print_table, write_json, write_table

if TYPE_CHECKING:
    from patchforge.model.experiments.recipe_trials import Found

COLUMNS = "", "steps × batch", "seconds", "held-out error", "less the recipe's", "Fréchet distance", "less the recipe's"


def recipe(
    folder: Annotated[Path, typer.Option(help="Folder of models and logs; runs resume.")] = Path("runs/recipe"),
    data: options.Table = options.TABLE,
    latents_of: options.Latents = options.LATENTS,
    judge: options.Judge = None,
    trial: Annotated[list[str] | None, typer.Option(help="Trials beside the recipe itself; default: all.")] = None,
    style: options.Style = "flat",
    steps: options.TrainingSteps = 600,
    batch: options.Batch = 32,
    width: options.Width = 96,
    depth: options.Depth = 3,
    size: options.MaxSize = 128,
    pictures: Annotated[int, typer.Option(min=10, help="Pictures per model, from the same classes and noise.")] = 500,
    out: options.Json = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Test the training recipe: short paired trainings that differ from it in one choice."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.judge import SHIPPED, Judge
    from patchforge.model.experiments.claims_training import Setting
    from patchforge.model.experiments.recipe_trials import TRIALS, run_trials
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        check_names(trial, TRIALS, "trial")
        table, setting = Pictures.load(data), Setting(style, width, depth, steps, batch, size=size)
        assessor, names = Judge.load(judge or SHIPPED), trial or list(TRIALS)
        outcomes = []
        for found in run_trials(table, assessor, latents_of, folder, setting, names, pictures):
            outcomes.append(found)
            Console(stderr=True).print(f"{found.label}: {found.error}, {found.distance}")
        rows = [_table_row(found) for found in outcomes]
        print_table(f"Width {width}, depth {depth}, {steps * batch} samples; 95 % intervals", COLUMNS, rows)
        if out is not None:
            write_json(out, [found.figures() for found in outcomes])
        if doc is not None:
            write_table(doc, "recipe", COLUMNS, rows)


def _table_row(found: Found) -> tuple[str, ...]:
    differences = ("" if value is None else f"{value}" for value in (found.error_difference, found.distance_difference))
    error_difference, distance_difference = differences
    spent = f"{found.steps} × {found.batch}", f"{found.seconds:.0f}"
    return found.label, *spent, f"{found.error}", error_difference, f"{found.distance}", distance_difference

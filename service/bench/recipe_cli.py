"""``patchforge bench recipe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.bench.trial_options import (
    LATENTS,
    TABLE,
    DocOption,
    JudgeOption,
    LatentsOption,
    OutOption,
    StepsOption,
    StyleOption,
    TableOption,
    ThreadsOption,
)
from service.cli_errors import typed_errors
from service.document import replace_between
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from model.evaluation.recipe_trials import Found

COLUMNS = "", "steps × batch", "seconds", "held-out error", "less the recipe's", "Fréchet distance", "less the recipe's"


def recipe(
    folder: Annotated[Path, typer.Option(help="Models and logs; go on where they stopped.")] = Path("runs/recipe"),
    data: TableOption = TABLE,
    latents_of: LatentsOption = LATENTS,
    judge: JudgeOption = None,
    trial: Annotated[list[str] | None, typer.Option(help="Which, besides the recipe; default: all.")] = None,
    style: StyleOption = "flat",
    steps: StepsOption = 600,
    batch: int = 32,
    width: int = 96,
    depth: int = 3,
    pictures: Annotated[int, typer.Option(min=10, help="Made by each model, on the same classes and noise.")] = 500,
    out: OutOption = None,
    doc: DocOption = None,
    threads: ThreadsOption = None,
) -> None:
    """The training recipe: short paired trainings, each with one choice changed."""
    from model.device import prepare_cpu
    from model.evaluation.claims_training import Setting
    from model.evaluation.judge import SHIPPED, Judge
    from model.evaluation.recipe_trials import TRIALS, run_trials
    from model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        if unknown := set(trial or ()) - set(TRIALS):
            raise InvalidRequest(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TRIALS)}", field="trial")
        table, setting = Pictures.load(data), Setting(style, width, depth, steps, batch)
        assessor, names = Judge.load(judge or SHIPPED), trial or list(TRIALS)
        outcomes = []
        for found in run_trials(table, assessor, latents_of, folder, setting, names, pictures):
            outcomes.append(found)
            Console(stderr=True).print(f"{found.label}: {found.error}, {found.distance}")
        rows = [cells(each) for each in outcomes]
        shown = Table(*COLUMNS, title=f"Width {width}, depth {depth}, {steps * batch} samples; 95 % intervals")
        for row in rows:
            shown.add_row(*row)
        Console(width=150).print(shown)
        if out is not None:
            out.write_text(json.dumps([each.figures() for each in outcomes], indent=1) + "\n")
        if doc is not None:
            replace_between(doc, "recipe", COLUMNS, rows)


def cells(found: Found) -> tuple[str, ...]:
    """One row of the table."""
    differences = ["" if each is None else f"{each}" for each in (found.error_difference, found.distance_difference)]
    spent = f"{found.steps} × {found.batch}", f"{found.seconds:.0f}"
    return found.label, *spent, f"{found.error}", differences[0], f"{found.distance}", differences[1]

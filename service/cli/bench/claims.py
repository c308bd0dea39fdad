"""`patchforge bench claims`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import check_names, print_table, write_json, write_table
from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    from patchforge.model.experiments.claims import Outcome

COLUMNS = (
    *("", "evaluations", "Fréchet distance", "less LTG, Euler", "precision", "recall", "sharpness", "less LTG, Euler"),
    *("own Fréchet distance", "less LTG, Euler"),
)
COMPARED = "distance", "sharpness", "own distance"


def claims(
    folder: Annotated[Path, typer.Option(help="Folder of models, logs and features; runs resume.")] = Path(
        "runs/claims"
    ),
    data: options.Table = options.TABLE,
    latents_of: options.Latents = options.LATENTS,
    judge: options.Judge = None,
    schedule: Annotated[list[str] | None, typer.Option(help="ltg, sit, uniform, mean, mixed; default: all.")] = None,
    style: options.Style = "flat",
    steps: options.TrainingSteps = 2000,
    batch: options.Batch = 32,
    width: options.Width = 128,
    depth: options.Depth = 4,
    size: options.MaxSize = 128,
    pictures: Annotated[int, typer.Option(min=10, help="Pictures per row, from the same conditions and noise.")] = 500,
    evaluations: Annotated[int, typer.Option(min=4, help="Network evaluations per picture; a multiple of 4.")] = 32,
    out: options.Json = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Test the paper's claims: train small models that differ only in timesteps, sample with equal evaluations."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.judge import SHIPPED, Judge
    from patchforge.model.evaluation.outside import OutsideJudge
    from patchforge.model.experiments.claims import Judges, compare
    from patchforge.model.experiments.claims_training import TRAINED, Setting, train_claims
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        check_names(schedule, TRAINED, "schedule")
        if evaluations % 4:
            raise InvalidRequest("must be a multiple of 4, because dual-loop uses 4 per step", field="evaluations")
        table, setting = Pictures.load(data), Setting(style, width, depth, steps, batch, size=size)
        for name in TRAINED:
            if not schedule or name in schedule:
                train_claims(table, latents_of, folder, setting, name)
        own = Judge.load(judge or SHIPPED)
        judges = Judges(OutsideJudge(), own, own.record["created"])
        outcomes = []
        for outcome in compare(table, judges, folder, setting, pictures, evaluations):
            outcomes.append(outcome)
            Console(stderr=True).print(f"{outcome.label}: {outcome.found['distance']}")
        rows = [_table_row(outcome) for outcome in outcomes]
        title = f"{steps} steps of {batch}, {pictures} pictures, no guidance, 95 % intervals"
        print_table(title, COLUMNS, rows, width=200)
        if out is not None:
            write_json(out, [outcome.figures() for outcome in outcomes])
        if doc is not None:
            write_table(doc, "claims", COLUMNS, rows)


def _table_row(outcome: Outcome) -> tuple[str, ...]:
    found, less = outcome.found, outcome.differences
    columns = ["distance", "precision", "recall", "sharpness", "own distance"]
    cells = [outcome.label, str(outcome.evaluations or "")]
    for name in columns:
        cells.append(str(found[name]))
        if name in COMPARED:
            cells.append(str(less.get(name, "")))
    return tuple(cells)

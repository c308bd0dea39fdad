"""``patchforge bench claims``."""

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
    from model.evaluation.claims import Outcome

COLUMNS = "", "evaluations", "Fréchet distance", "less LTG, Euler", "precision", "recall"


def claims(
    folder: Annotated[Path, typer.Option(help="Models, logs and features; go on where they stopped.")] = Path(
        "runs/claims"
    ),
    data: TableOption = TABLE,
    latents_of: LatentsOption = LATENTS,
    judge: JudgeOption = None,
    schedule: Annotated[list[str] | None, typer.Option(help="ltg, sit, uniform, mean, mixed; default: all.")] = None,
    style: StyleOption = "flat",
    steps: StepsOption = 2000,
    batch: int = 32,
    width: int = 128,
    depth: int = 4,
    pictures: Annotated[int, typer.Option(min=10, help="Made in each way, on the same conditions and noise.")] = 500,
    evaluations: Annotated[int, typer.Option(min=4, help="Of the network a picture; a multiple of four.")] = 32,
    out: OutOption = None,
    doc: DocOption = None,
    threads: ThreadsOption = None,
) -> None:
    """The paper's claims: train small models that differ in timesteps alone, then sample at equal evaluations."""
    from model.device import prepare_cpu
    from model.evaluation.claims import compare
    from model.evaluation.claims_training import TRAINED, Setting, train_claims
    from model.evaluation.judge import SHIPPED, Judge
    from model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        unknown = set(schedule or ()) - set(TRAINED)
        if unknown:
            raise InvalidRequest(
                f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TRAINED)}", field="schedule"
            )
        if evaluations % 4:
            raise InvalidRequest("must be a multiple of four, for dual-loop takes four a step", field="evaluations")
        table, setting = Pictures.load(data), Setting(style, width, depth, steps, batch)
        for name in TRAINED:
            if not schedule or name in schedule:
                train_claims(table, latents_of, folder, setting, name)
        assessor = Judge.load(judge or SHIPPED)
        outcomes = []
        for outcome in compare(table, assessor, folder, setting, pictures, evaluations):
            outcomes.append(outcome)
            Console(stderr=True).print(f"{outcome.label}: {outcome.distance}")
        shown = Table(*COLUMNS, title=f"{steps} steps of {batch}, {pictures} pictures, no guidance, 95 % intervals")
        for row in map(cells, outcomes):
            shown.add_row(*row)
        Console(width=140).print(shown)
        if out is not None:
            out.write_text(json.dumps([each.figures() for each in outcomes], indent=1) + "\n")
        if doc is not None:
            replace_between(doc, "claims", COLUMNS, [cells(each) for each in outcomes])


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One row of the table."""
    difference = "" if outcome.difference is None else f"{outcome.difference}"
    count = str(outcome.evaluations or "")
    return outcome.label, count, str(outcome.distance), difference, str(outcome.precision), str(outcome.recall)

"""Options that the benchmarks which train small models share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TableOption = Annotated[Path, typer.Option("--data", help="A picture table made by `patchforge data`.")]
LatentsOption = Annotated[Path, typer.Option(help="Bundle whose autoencoder all models share.")]
JudgeOption = Annotated[Path | None, typer.Option(help="Default: the shipped judge of emoji.")]
StyleOption = Annotated[str, typer.Option(help="Pictures of this style only; empty for all.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Of each training.")]
OutOption = Annotated[Path | None, typer.Option(help="Write the rows as JSON.")]
DocOption = Annotated[Path | None, typer.Option(help="Put the table into this page, between its marks.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; default: every core.")]
TABLE = Path("data/emoji-64.npz")
LATENTS = Path("model/bundles/emoji-class")

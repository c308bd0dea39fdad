"""`patchforge bench memory`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import check_names, print_table, write_json, write_table

if TYPE_CHECKING:
    from patchforge.model.experiments.memory_bench import MemoryRow

COLUMNS = (
    *("model", "parameters", "stored as", "products in", "weights, GB"),
    *("imports, GB", "loaded, GB", "peak, GB", "load, CPU s", "evaluation, CPU s"),
)


def memory(
    size: Annotated[list[str] | None, typer.Option(help="PFT-B, PFT-L, PFT-XL; default: all three.")] = None,
    bundle: Annotated[Path, typer.Option(help="Class-conditional bundle to measure first.")] = Path("emoji-class"),
    rounds: Annotated[int, typer.Option(min=1, help="Evaluations; the best counts.")] = 3,
    out: options.Json = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Measure memory and time of the paper's sizes, by stored type and precision, with random weights.

    Each row is a process of its own, on the CPU. `weights` are the files, which no process can undercut.
    """
    from patchforge.model.experiments.forward_bench import SIZES
    from patchforge.model.experiments.memory_bench import bench_memory
    from patchforge.model.shipped import bundle_folder

    with typed_errors():
        check_names(size, list(SIZES), "size")
        rows = []
        for row in bench_memory(bundle_folder(bundle), size or list(SIZES), rounds, threads):
            rows.append(row)
            print(" · ".join(_table_row(row)), flush=True)
        lines = [_table_row(row) for row in rows]
        print_table(f"One guided picture, best of {rounds}", COLUMNS, lines, width=160)
        if doc is not None:
            write_table(doc, "memory", COLUMNS, lines)
        if out is not None:
            write_json(out, [asdict(row) for row in rows])


def _table_row(row: MemoryRow) -> list[str]:
    figures = row.figures
    memory = (f"{value / 1e9:.2f}" for value in (row.weights, figures.imported, figures.loaded, figures.peak))
    millions = f"{row.parameters / 1e6:.0f} million"
    times = f"{figures.ready_seconds:.0f}", f"{figures.processor_seconds:.2g}"  # the clock's depend on other work
    return [row.model, millions, row.stored, row.products, *memory, *times]

"""`patchforge bench forward`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.plots import plot_forward
from patchforge.service.cli.report import check_names, print_table, write_json, write_table
from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    from patchforge.model.experiments.forward_bench import ForwardRow
    from patchforge.model.networks.config import ClassConfig


COLUMNS = "size", "evaluation", "seconds", "× paper", "× all", "difference", "GFLOP", "floor s", "of peak"


def forward(
    size: Annotated[list[str] | None, typer.Option(help="tiny, PFT-B, PFT-L, PFT-XL; default: the first two.")] = None,
    bundle: Annotated[Path, typer.Option(help="Class-conditional bundle for the size `tiny`.")] = Path("emoji-class"),
    rounds: Annotated[int, typer.Option(min=1, help="Runs of every case.")] = 5,
    out: options.Json = None,
    plot: options.Plot = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Measure one network evaluation, dense as in the paper and with active patches only: time, FLOPs, difference."""
    from patchforge.model.device import best_device, prepare_cpu
    from patchforge.model.experiments.forward_bench import bench_forward

    prepare_cpu(threads)
    rows: list[ForwardRow] = []
    with typed_errors():
        for name, config in _find_configurations(size or ["tiny", "PFT-B"], bundle).items():
            rows += (measured := list(bench_forward(name, config, best_device(), rounds)))
            peak = f"matmul peak {measured[0].peak_gflops:.0f} GFLOP/s"
            title = f"{name}, one guided picture, best of {rounds} rounds, {peak}"
            print_table(title, COLUMNS, map(_table_row, measured), width=130)
        if doc is not None:
            write_table(doc, "forward", COLUMNS, map(_table_row, rows))
        if out is not None:
            write_json(out, [asdict(row) for row in rows])
        if plot is not None:
            plot_forward(rows, plot)


def _find_configurations(names: list[str], bundle: Path) -> dict[str, ClassConfig]:
    from patchforge.model.experiments.forward_bench import SIZES
    from patchforge.model.networks.config import ClassConfig
    from patchforge.model.storage.bundle import open_bundle

    check_names(names, ["tiny", *SIZES], "size")
    configurations = dict(SIZES)
    if "tiny" in names:
        config = open_bundle(bundle).manifest.network.config
        if not isinstance(config, ClassConfig):
            raise InvalidRequest(f"{bundle.name} is not class-conditional", field="bundle")
        configurations["tiny"] = config
    return {name: configurations[name] for name in names}


def _table_row(row: ForwardRow) -> list[str]:
    ratios = f"{row.ratio:.2f}", f"{row.against_all:.2f}"
    work = f"{row.gflop:.1f}", f"{row.floor_seconds:.4f}", f"{row.gflops / row.peak_gflops:.0%}"
    return [row.size, row.case, f"{row.seconds:.4f}", *ratios, f"{row.difference:.1e}", *work]

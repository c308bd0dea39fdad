"""``patchforge bench forward``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.bench_plots import plot_forward
from service.cli_errors import typed_errors
from service.document import replace_between
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from model.evaluation.forward_bench import ForwardRow
    from model.pft import PFTConfig


COLUMNS = "size", "evaluation", "seconds", "× paper", "× all", "difference", "GFLOP", "floor s", "of peak"


def forward(
    size: Annotated[list[str] | None, typer.Option(help="tiny, PFT-B, PFT-XL; default: the first two.")] = None,
    bundle: Annotated[Path, typer.Option(help="Class-conditional bundle that has the size `tiny`.")] = Path(
        "model/bundles/emoji-class"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Every case runs once a round.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .png or .svg.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Put the table into this page, between its marks.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every core.")] = None,
) -> None:
    """One network evaluation: dense as the paper against packed active patches; seconds, FLOPs and differences."""
    from model.device import best_device, prepare_cpu
    from model.evaluation.forward_bench import bench_forward

    prepare_cpu(threads)
    rows: list[ForwardRow] = []
    with typed_errors():
        for name, config in _configurations(size or ["tiny", "PFT-B"], bundle).items():
            rows += (measured := list(bench_forward(name, config, best_device(), rounds)))
            _show(measured, rounds)
        if doc is not None:
            replace_between(doc, "forward", COLUMNS, map(_line, rows))
        if out is not None:
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        if plot is not None:
            plot_forward(rows, plot)


def _configurations(names: list[str], bundle: Path) -> dict[str, PFTConfig]:
    from model.bundle import open_bundle
    from model.evaluation.forward_bench import SIZES
    from model.networks import build_network
    from model.pft import PFT

    configurations = dict(SIZES)
    if "tiny" in names:
        network = build_network(open_bundle(bundle).manifest.network)
        if not isinstance(network, PFT):
            raise InvalidRequest(f"{bundle.name} is not class-conditional", field="bundle")
        configurations["tiny"] = network.config
    unknown = [name for name in names if name not in configurations]
    if unknown:
        raise InvalidRequest(f"unknown: {', '.join(unknown)}; there are tiny, {', '.join(SIZES)}", field="size")
    return {name: configurations[name] for name in names}


def _line(row: ForwardRow) -> list[str]:
    ratios = f"{row.ratio:.2f}", f"{row.against_all:.2f}"
    work = f"{row.gflop:.1f}", f"{row.floor_seconds:.4f}", f"{row.gflops / row.peak_gflops:.0%}"
    return [row.size, row.case, f"{row.seconds:.4f}", *ratios, f"{row.difference:.1e}", *work]


def _show(rows: list[ForwardRow], rounds: int) -> None:
    peak = rows[0].peak_gflops
    title = f"{rows[0].size}, one guided picture, best of {rounds} rounds, matmul peak {peak:.0f} GFLOP/s"
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*_line(row))
    Console(width=130).print(table)

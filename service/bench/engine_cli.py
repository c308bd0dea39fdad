"""``patchforge bench engine``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from service.bench_plots import plot_engine
from service.cli_errors import typed_errors
from service.document import replace_between
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from model.pipeline import Pipeline
    from service.worker.engine_bench import EngineRow, Served

COLUMNS = (
    *("policy", "load", "offered/s", "done/s", "p50 s", "p95 s", "p99 s", "preview p50 s", "preview p95 s"),
    *("patches an evaluation", "patches a request", "busy"),
)
AT_EQUAL_P95 = "against", "p95 s", "theirs, requests/s", "ours, requests/s", "ours ÷ theirs"
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)


def engine(
    bundle_dir: Annotated[Path, typer.Option(help="Folder of model bundles; those of one grid are served.")] = Path(
        "model/bundles"
    ),
    requests: Annotated[int, typer.Option(min=4, help="Length of a traffic.")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="How many traffics, with seeds of their own, to serve.")] = 1,
    load: Annotated[list[float] | None, typer.Option(min=0.05, help="Shares of capacity; default 0.5 to 1.5.")] = None,
    presets: Annotated[
        bool, typer.Option(help="Requests for adaptive are of the presets, not of its own defaults.")
    ] = False,
    adaptive_only: Annotated[bool, typer.Option(help="Nobody asks for another sampler.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first traffic; the next count up.")] = 0,
    long: Annotated[
        bool, typer.Option(help="Against request-level batching only, for which longer traffic can be afforded.")
    ] = False,
    patch_budget: Annotated[int | None, typer.Option(min=1, help="Default: profiled, as a worker does.")] = None,
    cpu_clock: Annotated[
        bool, typer.Option(help="Count CPU seconds, where other programs run too; needs one thread.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .png or .svg.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Put the tables into this page, between their marks.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every core.")] = None,
) -> None:
    """Mixed traffic through the real engine: one at a time, request-level and step-level batching, and ours."""
    import time

    from model.device import prepare_cpu
    from service.worker.bench_traffic import mixed_traffic
    from service.worker.budgets import patch_budget as profiled
    from service.worker.engine_bench import (
        OURS,
        PAPER,
        POLICIES,
        REQUEST,
        alone,
        bench_engine,
        largest_difference,
        psnr_of_ours,
    )

    with typed_errors():
        if cpu_clock and threads != 1:
            raise InvalidRequest("CPU seconds are those of one thread: give --threads 1", field="cpu-clock")
        prepare_cpu(threads)
        pipelines = _of_one_grid(bundle_dir)
        budgets = {name: patch_budget or profiled(pipeline) for name, pipeline in pipelines.items()}
        traffics = [
            mixed_traffic(pipelines, requests, seed + number, presets, adaptive_only) for number in range(rounds)
        ]
        expected = [alone(pipelines, arrivals) for arrivals in traffics]
        rows: list[EngineRow] = []
        differences: list[float] = []
        served: dict[str, list[Served]] = {}
        clock = time.process_time if cpu_clock else time.perf_counter
        policies = (PAPER, REQUEST, OURS) if long else POLICIES
        for row, result in bench_engine(pipelines, traffics, sorted(load or LOADS), budgets, clock, policies):
            rows.append(row)
            served[row.policy] = result
            if row.policy == OURS:
                differences.append(largest_difference(result, expected))
        figures: dict[str, Any] = {
            "patch_budgets": budgets,
            "largest_latent_difference_from_running_alone": max(differences),
            "median_psnr_against_dense_evaluation": psnr_of_ours(pipelines, traffics, served[OURS], served[REQUEST]),
            "at_equal_p95": _at_equal_p95(rows),
            "rows": [_finite(asdict(row)) for row in rows],
        }
        _show(rows, figures)
        if doc is not None:
            which = ", ".join(["engine", *["presets"] * presets, *["adaptive only"] * adaptive_only, *["long"] * long])
            replace_between(doc, which, COLUMNS, map(_line, rows))
            replace_between(doc, f"{which} at equal p95", AT_EQUAL_P95, map(_equal_line, figures["at_equal_p95"]))
        if out is not None:
            out.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
        if plot is not None:
            plot_engine(rows, plot)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which knows no infinity: null where everything waited from the start."""
    return {key: None if value == math.inf else value for key, value in row.items()}


def _of_one_grid(folder: Path) -> dict[str, Pipeline]:
    from model.bundle import list_bundles
    from model.pipeline import Pipeline

    bundles = list_bundles(folder)
    if not bundles:
        raise InvalidRequest(f"no bundle in {folder}", field="bundle-dir")
    same = [each for each in bundles if each.manifest.grid == bundles[0].manifest.grid]
    return {each.name: Pipeline(each) for each in same}


def _at_equal_p95(rows: list[EngineRow]) -> list[dict[str, Any]]:
    """For each load that request-level batching can keep up with, with our forward and with the paper's: what ours
    carries at its p95."""
    from service.worker.engine_bench import OURS, PAPER, REQUEST, capacity_of, rate_at

    return [
        {
            "policy": row.policy,
            "load": row.load,
            "p95": row.p95,
            "theirs": row.offered,
            "ours": rate_at(rows, OURS, row.p95),
        }
        for policy in (REQUEST, PAPER)
        for row in rows
        if row.policy == policy and row.offered <= capacity_of(rows, policy)
    ]


def _line(row: EngineRow) -> list[str]:
    times = (row.p50, row.p95, row.p99, row.preview_p50, row.preview_p95)
    load, offered = (f"{value:.2f}" if math.isfinite(value) else "all" for value in (row.load, row.offered))
    shown = [f"{value:.2f}" for value in (row.completed, *times)]
    work = f"{row.patches_per_evaluation:.0f}", f"{row.patch_evaluations:.0f}", f"{row.busy:.0%}"
    return [row.policy, load, offered, *shown, *work]


def _equal_line(equal: dict[str, Any]) -> list[str]:
    theirs, ours = equal["theirs"], equal["ours"]
    return [equal["policy"], f"{equal['p95']:.2f}", f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}×"]


def _show(rows: list[EngineRow], figures: dict[str, Any]) -> None:
    console = Console(width=150)
    table = Table(*COLUMNS, title="Open-loop mixed traffic; load 1 is the capacity of request-level batching")
    for row in rows:
        table.add_row(*_line(row))
    console.print(table)
    table = Table(*AT_EQUAL_P95, title="What is carried within the same p95; 0: not even the lowest load measured")
    for equal in figures["at_equal_p95"]:
        table.add_row(*_equal_line(equal))
    console.print(table)
    console.print(
        f"largest latent difference from running alone {figures['largest_latent_difference_from_running_alone']:.1e}, "
        f"PSNR against dense evaluation {figures['median_psnr_against_dense_evaluation']:.0f} dB (median)"
    )

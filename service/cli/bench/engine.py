"""`patchforge bench engine`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchforge.service.cli import options
from patchforge.service.cli.bench.slo import measure_slo
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.plots import plot_engine
from patchforge.service.cli.report import print_table, write_json, write_table
from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.storage.bundle import Bundle
    from patchforge.service.bench.engine import EngineRow, Served
    from patchforge.service.messages.fit import Size

COLUMNS = (
    *("policy", "load", "offered/s", "done/s", "p50 s", "p95 s", "p99 s", "preview p50 s", "preview p95 s"),
    *("patches an evaluation", "patches a request", "busy"),
)
AT_EQUAL_P95 = "against", "p95 s", "theirs, requests/s", "ours, requests/s", "ours ÷ theirs"
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)
SLO_BUNDLE = Path("emoji-text")


def engine(
    bundle_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of bundles; only those with the grid of the first are used. Default: the shipped."),
    ] = None,
    requests: Annotated[int, typer.Option(min=4, help="Requests per traffic.")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="Number of traffics, with consecutive seeds.")] = 1,
    load: Annotated[list[float] | None, typer.Option(min=0.05, help="Shares of capacity; default 0.5 to 1.5.")] = None,
    presets: Annotated[
        bool, typer.Option(help="Requests for adaptive use the quality presets instead of its own defaults.")
    ] = False,
    adaptive_only: Annotated[bool, typer.Option(help="All requests use adaptive.")] = False,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="WIDTHxHEIGHT; several are asked for equally often, and only request-level batching by size is "
            "compared. For text models, whether they were trained at it or not."
        ),
    ] = None,
    seed: options.Seed = 0,
    long: Annotated[
        bool, typer.Option(help="Compare with request-level batching only, to have time for longer traffic.")
    ] = False,
    slo: Annotated[
        bool, typer.Option("--slo", help="Instead: which answers come in time, and how good they are, for --bundle.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Folder of the only bundle, or name of a shipped one.  [with --slo: emoji-text]"),
    ] = None,
    patch_budget: Annotated[int | None, typer.Option(min=1, help="Default: profiled, as a worker does.")] = None,
    cpu_clock: Annotated[
        bool, typer.Option(help="Measure CPU seconds, for a machine that runs other programs; needs one thread.")
    ] = False,
    out: options.Json = None,
    plot: options.Plot = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Serve mixed traffic with the real engine: one at a time, request-level and step-level batching, and ours."""
    import time

    from patchforge.model.device import prepare_cpu
    from patchforge.service.bench.engine import (
        OURS,
        PAPER,
        POLICIES,
        REQUEST,
        alone,
        bench_engine,
        largest_difference,
        psnr_of_ours,
    )
    from patchforge.service.bench.engine_traffic import mixed_traffic
    from patchforge.service.worker.budgets import patch_budget as profiled

    with typed_errors():
        if cpu_clock and threads != 1:
            raise InvalidRequest("requires --threads 1, because CPU seconds add up over threads", field="cpu-clock")
        prepare_cpu(threads, only_pictures=True)
        if bundle and bundle_dir:
            raise InvalidRequest("cannot be used together with --bundle-dir", field="bundle")
        if slo:
            measure_slo(bundle or SLO_BUNDLE, requests, load, seed, patch_budget, cpu_clock, out, doc)
            return
        from patchforge.model.shipped import BUNDLES

        sizes = [options.read_size(each) for each in size or []]
        pipelines = _open_bundles(bundle, bundle_dir or BUNDLES, sizes)
        budgets = {name: patch_budget or profiled(pipeline) for name, pipeline in pipelines.items()}
        traffics = [
            mixed_traffic(pipelines, requests, seed + number, presets, adaptive_only, sizes) for number in range(rounds)
        ]
        expected = [alone(pipelines, arrivals) for arrivals in traffics]
        rows: list[EngineRow] = []
        differences: list[float] = []
        served: dict[str, list[Served]] = {}
        clock = time.process_time if cpu_clock else time.perf_counter
        policies = (REQUEST, OURS) if sizes else (PAPER, REQUEST, OURS) if long else POLICIES
        for row, result in bench_engine(pipelines, traffics, sorted(load or LOADS), budgets, clock, policies):
            rows.append(row)
            served[row.policy] = result
            if row.policy == OURS:
                differences.append(largest_difference(result, expected))
        equals = _compare_at_equal_p95(rows)
        figures: dict[str, Any] = {
            "patch_budgets": budgets,
            "largest_latent_difference_from_running_alone": max(differences),
            "median_psnr_against_dense_evaluation": psnr_of_ours(pipelines, traffics, served[OURS], served[REQUEST]),
            "at_equal_p95": equals,
            "rows": [_replace_infinity(asdict(row)) for row in rows],
        }
        title = "Open-loop mixed traffic; load 1 is the capacity of request-level batching"
        print_table(title, COLUMNS, map(_table_row, rows))
        title = "Rates with the same p95; 0 = p95 is higher even at the lowest load measured"
        print_table(title, AT_EQUAL_P95, map(_equal_row, equals))
        print(
            f"largest latent difference from running alone {max(differences):.1e}, "
            f"PSNR against dense evaluation {figures['median_psnr_against_dense_evaluation']:.0f} dB (median)"
        )
        if doc is not None:
            said = {"presets": presets, "adaptive only": adaptive_only, "sizes": bool(sizes), "long": long}
            only = list(pipelines) if bundle else []
            name = ", ".join(["engine", *only, *(word for word, true in said.items() if true)])
            write_table(doc, name, COLUMNS, map(_table_row, rows))
            write_table(doc, f"{name} at equal p95", AT_EQUAL_P95, map(_equal_row, equals))
        if out is not None:
            write_json(out, figures)
        if plot is not None:
            plot_engine(rows, plot)


def _replace_infinity(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: null in rows where all requests were waiting from the start."""
    return {key: None if value == math.inf else value for key, value in row.items()}


def _open_bundles(only: Path | None, folder: Path, sizes: Sequence[Size]) -> dict[str, Pipeline]:
    """The only bundle, or those with the grid of the folder's first; with `sizes`, only those that can draw them."""
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.storage.bundle import list_bundles, open_bundle

    bundles = [open_bundle(only)] if only else list_bundles(folder)
    if sizes:
        bundles = [_draws(bundle, sizes) for bundle in bundles if bundle.manifest.network.kind == "text"]
    if not bundles:
        raise InvalidRequest(f"no bundle in {folder}", field="bundle-dir")
    return {bundle.name: Pipeline(bundle) for bundle in bundles if bundle.manifest.grid == bundles[0].manifest.grid}


def _draws(bundle: Bundle, sizes: Sequence[Size]) -> Bundle:
    from pydantic import ValidationError

    from patchforge.model.storage.bundle import BundleManifest, explain_error

    manifest = bundle.manifest
    further = [size for size in dict.fromkeys(sizes) if size != manifest.size]
    try:
        changed = BundleManifest.model_validate(manifest.model_dump() | {"sizes": further})
    except ValidationError as error:
        raise InvalidRequest(f"{bundle.name}: {explain_error(error)}", field="size") from error
    return replace(bundle, manifest=changed)


def _compare_at_equal_p95(rows: list[EngineRow]) -> list[dict[str, Any]]:
    """The rate that ours reaches with the p95 of request-level batching, with our forward and with the paper's.

    One entry per load up to the capacity of request-level batching.
    """
    from patchforge.service.bench.engine import OURS, PAPER, REQUEST, capacity_of, rate_at

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


def _table_row(row: EngineRow) -> list[str]:
    times = (row.p50, row.p95, row.p99, row.preview_p50, row.preview_p95)
    load, offered = (f"{value:.2f}" if math.isfinite(value) else "all" for value in (row.load, row.offered))
    shown = [f"{value:.2f}" for value in (row.completed, *times)]
    work = f"{row.patches_per_evaluation:.0f}", f"{row.patch_evaluations:.0f}", f"{row.busy:.0%}"
    return [row.policy, load, offered, *shown, *work]


def _equal_row(equal: dict[str, Any]) -> list[str]:
    theirs, ours = equal["theirs"], equal["ours"]
    return [equal["policy"], f"{equal['p95']:.2f}", f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}×"]

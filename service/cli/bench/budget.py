"""`patchforge bench budget`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.plots import plot_budgets
from patchforge.service.cli.report import print_table, write_json, write_table

if TYPE_CHECKING:
    from patchforge.model.experiments.budget_curve import BudgetPoint

SHOWN = "found first", "top five", "cosine", "sharpness", "distance"


def budget(
    bundle: options.Bundle,
    data: options.Table = options.TABLE,
    share: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=1, help="Budget as a share of the model's own cost; repeatable; default: six."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=10, help="Pictures to draw on each budget.")] = 280,
    seed: options.Seed = 0,
    out: options.Json = None,
    plot: options.Plot = None,
    doc: options.Doc = None,
    record: Annotated[bool, typer.Option(help="Write the curve into bundle.json.")] = False,
    threads: options.Threads = None,
) -> None:
    """Measure a model's pictures on ever smaller budgets of patch evaluations, beside those without one."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.outside import OutsideJudge
    from patchforge.model.experiments.budget_curve import SHARES, measure_budgets
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.shipped import bundle_folder
    from patchforge.model.storage.bundle import read_manifest, write_manifest
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        pipeline, judge = Pipeline.open(bundle), OutsideJudge()
        points = measure_budgets(pipeline, judge, Pictures.load(data), share or SHARES, pictures, seed)
        name = pipeline.manifest.name
        columns, rows = _table(points)
        print_table(f"{name}, {pictures} pictures on each budget", columns, rows, width=150)
        if doc is not None:
            write_table(doc, f"{name} budgets", columns, rows)
        if plot is not None:
            plot_budgets(name, points, plot)
        curve = [point.recorded() for point in points]
        if out is not None:
            write_json(out, curve)
        if record:
            folder = bundle_folder(bundle)
            manifest = read_manifest(folder)
            evaluation = {**manifest.evaluation, "budgets": curve}
            write_manifest(folder, manifest.model_copy(update={"evaluation": evaluation}))


def _table(points: list[BudgetPoint]) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in SHOWN if name in points[0].figures]
    columns = ["budget", "patch evaluations", "PSNR, dB", *(f"{name}, − without a budget" for name in shown)]
    whole, *rest = points
    rows = [["none", f"{whole.spent:.0f}", "", *(str(whole.figures[name]) for name in shown)]]
    for point in rest:
        differences = (str(point.differences[name]) for name in shown)
        rows.append([f"{point.share:.0%}", f"{point.spent:.0f}", f"{point.psnr:.1f}", *differences])
    return columns, rows

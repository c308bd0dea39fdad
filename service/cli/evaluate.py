"""`patchforge eval` and `patchforge grid`: measures and shows how good a bundle's pictures are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.plots import plot_calibration, plot_measures
from patchforge.service.cli.report import check_names, print_table, write_json, write_table
from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    from patchforge.model.evaluation.evaluate import Report
    from patchforge.model.evaluation.frechet import Interval
    from patchforge.model.pipeline import Pipeline

TIMES = {"uniform": "all patches at one time", "ltg": "times as in training"}


def evaluate(
    bundle: options.Bundle,
    data: options.Table = options.TABLE,
    judge: options.Judge = None,
    part: Annotated[list[str] | None, typer.Option(help="quality, prompts, calibration; default: all three.")] = None,
    pictures: Annotated[int, typer.Option(min=10, help="Pictures to draw; distances need equal numbers.")] = 1000,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    option: Annotated[list[str] | None, typer.Option(help="Sampler option such as quantile=0.4; repeatable.")] = None,
    seed: options.Seed = 0,
    out: options.Json = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots; needs matplotlib.")] = None,
    doc: options.Doc = None,
    record: Annotated[bool, typer.Option(help="Write the figures into bundle.json.")] = False,
    threads: options.Threads = None,
) -> None:
    """Measure a bundle: Fréchet distance, precision, recall, prompts, classes, uncertainty; with intervals and limits.

    The limits are chance and what real and reconstructed pictures reach.
    """
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.evaluate import PARTS
    from patchforge.model.evaluation.evaluate import evaluate as run
    from patchforge.model.evaluation.judge import SHIPPED, Judge
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.shipped import bundle_folder
    from patchforge.model.storage.bundle import read_manifest, write_manifest
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        check_names(part, PARTS, "part")
        pipeline = Pipeline.open(bundle)
        choice = choose_sampler(pipeline, sampler, steps, guidance, option or [])
        made_by = pipeline.sampler(**choice)
        assessor, table = Judge.load(judge or SHIPPED), Pictures.load(data)
        wanted = [name for name in PARTS if not part or name in part]
        report = run(pipeline, assessor, table, made_by, pictures, wanted, seed)
        figures = {"sampler": choice, "judge": assessor.summary, **report.figures()}
        print(pipeline.manifest.name)
        print_report(report, describe_choice(choice))
        if out is not None:
            write_json(out, figures)
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            if report.measures:
                plot_measures(report, plots / "measures.svg")
            if report.calibration:
                plot_calibration(report, plots / "calibration.svg")
        if doc is not None:
            name = pipeline.manifest.name
            for title, (columns, rows) in report_tables(report, describe_choice(choice)).items():
                if not title.endswith("ltg"):  # the page shows calibration for one way to draw times
                    write_table(doc, f"{name} {title}", columns, rows)
        if record:
            folder = bundle_folder(bundle)
            write_manifest(folder, read_manifest(folder).model_copy(update={"evaluation": figures}))


def grid(
    bundle: options.Bundle,
    out: Annotated[Path, typer.Option(help="File to write: .png, .jpg or .webp.")],
    data: options.Table = options.TABLE,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
) -> None:
    """Draw a hundred pictures of random prompts, beside the real pictures of these prompts."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.grid import write_grid
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        pipeline = Pipeline.open(bundle)
        made_by = pipeline.sampler(**choose_sampler(pipeline, sampler, steps, guidance, []))
        write_grid(pipeline, Pictures.load(data), made_by, out, seed)
    print(out)


def choose_sampler(
    pipeline: Pipeline, name: str | None, steps: int | None, guidance: float | None, given: list[str]
) -> dict[str, Any]:
    """Arguments of `Pipeline.sampler`: the given values, and the bundle's defaults for the rest.

    Raises:
        InvalidRequest: an option does not have the form name=value.
    """
    defaults = pipeline.manifest.defaults
    own = defaults.sampler.model_dump(exclude={"name"}) if name in (None, defaults.sampler.name) else {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise InvalidRequest(f"{option!r} is not name=value", field="option")
        try:
            own[key] = json.loads(value)
        except ValueError:
            own[key] = value
    return {
        "name": name or defaults.sampler.name,
        "steps": defaults.steps if steps is None else steps,
        "guidance": defaults.guidance if guidance is None else guidance,
        **own,
    }


def describe_choice(choice: dict[str, Any]) -> str:
    """The arguments of `Pipeline.sampler` in one line."""
    rest = " ".join(f"{key}={value}" for key, value in choice.items() if key not in ("name", "steps", "guidance"))
    return f"{choice['name']} {rest}".strip() + f", {choice['steps']} steps, guidance {choice['guidance']:g}"


def print_report(report: Report, choice: str) -> None:
    """Print all tables on stdout."""
    for columns, rows in report_tables(report, choice).values():
        print_table(None, columns, rows, width=120)
    if report.patch_evaluations is not None and report.saved is not None:
        print(f"{report.patch_evaluations:.0f} patch evaluations per picture, {report.saved:.1%} saved")
    print(f"95 % intervals, {report.seconds:.0f} s")


def report_tables(report: Report, choice: str) -> dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Columns and rows of every table, by the name of its marks in the page."""
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {}
    made = f"{report.pictures} pictures: {choice}"
    rows = [
        (name.replace("_", " "), *map(_format, (found.made, found.reconstructed, found.real, found.chance)))
        for name, found in report.measures.items()
    ]
    if rows:
        tables["measures"] = ((made, "model", "reconstructions", "real", "chance"), rows)
    for name, calibration in report.calibration.items():
        ranked = [
            (_format_range(row.low, row.high), _format(row.spearman), _format(row.within)) for row in calibration.times
        ]
        tables[f"ranking {name}"] = ((f"t, {TIMES[name]}", "Spearman over all patches", "within a picture"), ranked)
        tenths = [
            (f"{tenth.predicted:.3g}", str(tenth.measured), f"{tenth.measured.value / tenth.predicted:.2f}")
            for tenth in calibration.reliability
        ]
        columns = f"predicted variance, {TIMES[name]}", "measured squared error", "ratio"
        tables[f"reliability {name}"] = (columns, tenths)
    return tables


def _format_range(low: float, high: float) -> str:
    """`0.05`, or `0.10–0.20`."""
    return f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}"


def _format(figure: Interval | float | None) -> str:
    return "" if figure is None else f"{figure:.3g}" if isinstance(figure, float) else str(figure)

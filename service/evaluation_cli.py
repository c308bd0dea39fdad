"""``patchforge eval`` and ``patchforge grid``: how good a bundle's pictures are, in figures and to the eye."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from service.cli_errors import typed_errors
from service.document import replace_between
from service.errors import InvalidRequest
from service.evaluation_plots import plot_calibration, plot_measures

if TYPE_CHECKING:
    from model.evaluation.evaluate import Report
    from model.evaluation.frechet import Interval
    from model.pipeline import Pipeline

BundleArgument = Annotated[Path, typer.Argument(help="Folder of a model bundle.")]
TableOption = Annotated[Path, typer.Option("--data", help="A picture table made by `patchforge data`.")]
JudgeOption = Annotated[
    Path | None, typer.Option("--judge", help="Made by `patchforge train judge`; default: the shipped judge of emoji.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; default: every core.")]
SamplerOption = Annotated[str | None, typer.Option(help="Default: the bundle's, with its steps and guidance.")]


TIMES = {"uniform": "all patches at one time", "ltg": "times as in training"}


def evaluate(
    bundle: BundleArgument,
    data: TableOption = Path("data/emoji-64.npz"),
    judge: JudgeOption = None,
    part: Annotated[list[str] | None, typer.Option(help="quality, prompts, calibration; default: all three.")] = None,
    pictures: Annotated[int, typer.Option(min=10, help="Made for distances; compare only equal numbers.")] = 1000,
    sampler: SamplerOption = None,
    steps: int | None = None,
    guidance: float | None = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the sampler: quantile=0.4, again for others.")] = None,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots; needs matplotlib.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Put the tables into this page, between its marks.")] = None,
    record: Annotated[bool, typer.Option(help="Write everything into bundle.json.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Fréchet distance, precision, recall, prompts, classes, uncertainty: with intervals, beside floor and ceiling."""
    from model.bundle import read_manifest, write_manifest
    from model.device import prepare_cpu
    from model.evaluation.evaluate import PARTS
    from model.evaluation.evaluate import evaluate as run
    from model.evaluation.judge import SHIPPED, Judge
    from model.pipeline import Pipeline
    from model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        unknown = set(part or ()) - set(PARTS)
        if unknown:
            raise InvalidRequest(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", field="part")
        pipeline = Pipeline.open(bundle)
        choice = sampler_choice(pipeline, sampler, steps, guidance, option or [])
        made_by = pipeline.sampler(**choice)
        assessor, table = Judge.load(judge or SHIPPED), Pictures.load(data)
        wanted = [each for each in PARTS if not part or each in part]
        report = run(pipeline, assessor, table, made_by, pictures, wanted, seed)
        figures = {"sampler": choice, "judge": assessor.summary, **report.figures()}
        print(pipeline.manifest.name)
        show(report, described(choice))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(figures, indent=1) + "\n")
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            if report.measures:
                plot_measures(report, plots / "measures.svg")
            if report.calibration:
                plot_calibration(report, plots / "calibration.svg")
        if doc is not None:
            name = pipeline.manifest.name
            for of, (columns, rows) in page_tables(report, described(choice)).items():
                if not of.endswith("ltg"):  # the page says enough with one way of drawing times
                    replace_between(doc, f"{name} {of}", columns, rows)
        if record:
            write_manifest(bundle, read_manifest(bundle).model_copy(update={"evaluation": figures}))


def grid(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="Where to write: .png, .jpg or .webp.")],
    data: TableOption = Path("data/emoji-64.npz"),
    sampler: SamplerOption = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    threads: ThreadsOption = None,
) -> None:
    """A hundred pictures beside the hundred real ones they were asked to be, drawn by chance, each with its prompt."""
    from model.device import prepare_cpu
    from model.evaluation.grid import write_grid
    from model.pipeline import Pipeline
    from model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        pipeline = Pipeline.open(bundle)
        made_by = pipeline.sampler(**sampler_choice(pipeline, sampler, steps, guidance, []))
        write_grid(pipeline, Pictures.load(data), made_by, out, seed)
    print(out)


def sampler_choice(
    pipeline: Pipeline, name: str | None, steps: int | None, guidance: float | None, options: list[str]
) -> dict[str, Any]:
    """Arguments of `Pipeline.sampler`: the bundle's defaults, except for what is given.

    Raises:
        InvalidRequest: an option is not of the form name=value.
    """
    defaults = pipeline.manifest.defaults
    own = defaults.sampler.model_dump(exclude={"name"}) if name in (None, defaults.sampler.name) else {}
    for each in options:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise InvalidRequest(f"{each!r} is not name=value", field="option")
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


def described(choice: dict[str, Any]) -> str:
    """One line."""
    rest = " ".join(f"{key}={value}" for key, value in choice.items() if key not in ("name", "steps", "guidance"))
    return f"{choice['name']} {rest}".strip() + f", {choice['steps']} steps, guidance {choice['guidance']:g}"


def show(report: Report, choice: str) -> None:
    """All tables on stdout."""
    console = Console(width=120)
    for columns, rows in page_tables(report, choice).values():
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if report.patch_evaluations is not None and report.saved is not None:
        console.print(f"{report.patch_evaluations:.0f} patch evaluations a picture, {report.saved:.1%} saved")
    console.print(f"95 % intervals, {report.seconds:.0f} s")


def page_tables(report: Report, choice: str) -> dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Columns and rows of each table, by the name of its marks."""
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {}
    made = f"{report.pictures} pictures: {choice}"
    rows = [
        (name.replace("_", " "), str(each.made), _cell(each.reconstructed), _cell(each.real), _share(each.chance))
        for name, each in report.measures.items()
    ]
    if rows:
        tables["measures"] = ((made, "model", "reconstructions", "real", "chance"), rows)
    for name, calibration in report.calibration.items():
        ranked = [(span(row.low, row.high), str(row.spearman), _cell(row.within)) for row in calibration.times]
        tables[f"ranking {name}"] = ((f"t, {TIMES[name]}", "Spearman over all patches", "within a picture"), ranked)
        tenths = [
            (f"{tenth.predicted:.3g}", str(tenth.measured), f"{tenth.measured.value / tenth.predicted:.2f}")
            for tenth in calibration.reliability
        ]
        columns = f"predicted variance, {TIMES[name]}", "measured squared error", "ratio"
        tables[f"reliability {name}"] = (columns, tenths)
    return tables


def span(low: float, high: float) -> str:
    """``0.05``, or ``0.10–0.20``."""
    return f"{low:.2f}" if low == high else f"{low:.2f}–{high:.2f}"


def _share(chance: float | None) -> str:
    return "" if chance is None else f"{chance:.3g}"


def _cell(interval: Interval | None) -> str:
    return "" if interval is None else str(interval)

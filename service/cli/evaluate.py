"""`patchforge eval` and `patchforge grid`: measures and shows how good a bundle's pictures are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchforge.service.cli import options
from patchforge.service.cli.album import read_prompts
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.plots import plot_calibration, plot_measures
from patchforge.service.cli.report import check_names, print_table, write_json, write_table
from patchforge.service.cli.sample import choose_subjects
from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    from patchforge.model.evaluation.against import FeatureJudge
    from patchforge.model.evaluation.evaluate import Report
    from patchforge.model.evaluation.frechet import Interval
    from patchforge.model.pipeline import Pipeline

OWN_FEATURES, NATURAL_FEATURES = "judge", "efficientnet_lite0"
TIMES = {"uniform": "all patches at one time", "ltg": "times as in training"}


def evaluate(
    bundle: options.Bundle,
    data: options.Table = options.TABLE,
    judge: options.Judge = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Whose features measure the quality: judge, or efficientnet_lite0 for natural pictures. "
            "Default: judge; with --reference: efficientnet_lite0."
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help=".npz of real pictures to compare with instead of --data, as the ADM suite has.")
    ] = None,
    npz: Annotated[Path | None, typer.Option(help="With --reference: write the pictures into this file too.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="With --reference, for a text model: file with one prompt a line.", exists=True),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="outside, quality, prompts, calibration; default: all that make sense."),
    ] = None,
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
    from patchforge.model.pipeline import Pipeline

    prepare_cpu(threads)
    with typed_errors():
        check_names([features] if features else None, (OWN_FEATURES, NATURAL_FEATURES), "features")
        if reference is None and (npz or prompts):
            raise InvalidRequest("--npz and --prompts are for --reference", field="npz")
        if reference is not None and part:
            raise InvalidRequest("--part is for --data: with --reference only the quality is measured", field="part")
        pipeline = Pipeline.open(bundle)
        choice = choose_sampler(pipeline, sampler, steps, guidance, option or [])
        if reference is not None:
            chosen = _Reference(reference, features or NATURAL_FEATURES, prompts, npz)
            report, asked = _measure_against(pipeline, chosen, judge, choice, pictures, seed)
        else:
            report, asked = _measure_by_table(pipeline, data, features, judge, part, choice, pictures, seed)
        figures = {"sampler": choice, **asked, **report.figures()}
        _show(report, pipeline.manifest.name, choice, figures, out, plots, doc)
        if record:
            _record(bundle, figures)


@dataclass(frozen=True)
class _Reference:
    """Real pictures in a file, and what to compare with them."""

    file: Path
    features: str
    prompts: Path | None
    npz: Path | None


def _measure_against(
    pipeline: Pipeline, reference: _Reference, judge: Path | None, choice: dict[str, Any], pictures: int, seed: int
) -> tuple[Report, dict[str, Any]]:
    """Measure against a file; also return what the figures depend on."""
    from patchforge.model.evaluation.evaluate import evaluate_against

    if reference.npz is not None and reference.npz.suffix != ".npz":
        raise InvalidRequest("--npz must end in .npz", field="npz")
    words = read_prompts(reference.prompts) if reference.prompts else None
    manifest = pipeline.manifest
    subjects = choose_subjects(manifest.name, list(manifest.class_names), words, True, seed)
    asked = [subjects.of(index) for index in range(pictures)]
    features, about = _load_features(reference.features, judge)
    made_by = pipeline.sampler(**choice)
    report = evaluate_against(pipeline, features, reference.file, made_by, asked, seed, reference.npz)
    return report, {"reference": reference.file.name, **about}


def _measure_by_table(
    pipeline: Pipeline,
    data: Path,
    features: str | None,
    judge: Path | None,
    part: list[str] | None,
    choice: dict[str, Any],
    pictures: int,
    seed: int,
) -> tuple[Report, dict[str, Any]]:
    """Measure with a table of real pictures; also return what the figures depend on."""
    from patchforge.model.evaluation.evaluate import PARTS
    from patchforge.model.evaluation.evaluate import evaluate as run
    from patchforge.model.evaluation.judge import SHIPPED, Judge
    from patchforge.model.training.data import Pictures

    check_names(part, PARTS, "part")
    made_by = pipeline.sampler(**choice)
    table, assessor = Pictures.load(data), Judge.load(judge or SHIPPED)
    if features != NATURAL_FEATURES:
        wanted = [name for name in PARTS if not part or name in part]
        return run(pipeline, assessor, table, made_by, pictures, wanted, seed), {"judge": assessor.summary}
    wanted = [name for name in PARTS if name in (part or ["quality"])]
    eyes, about = _load_features(features, judge)
    return run(pipeline, assessor, table, made_by, pictures, wanted, seed, eyes), about


def _load_features(name: str, judge: Path | None) -> tuple[FeatureJudge, dict[str, Any]]:
    """Return who computes features, and how the record names it."""
    from patchforge.model.evaluation.judge import SHIPPED, Judge
    from patchforge.model.evaluation.outside import OutsideJudge

    if name == NATURAL_FEATURES:
        return OutsideJudge(), {"features": name}
    own = Judge.load(judge or SHIPPED)
    return own, {"features": name, "judge": own.summary}


def _show(
    report: Report,
    name: str,
    choice: dict[str, Any],
    figures: dict[str, Any],
    out: Path | None,
    plots: Path | None,
    doc: Path | None,
) -> None:
    """Print the tables, and write them where they are wanted."""
    print(name)
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
        for title, (columns, rows) in report_tables(report, describe_choice(choice)).items():
            if not title.endswith("ltg"):  # the page shows calibration for one way to draw times
                write_table(doc, f"{name} {title}", columns, rows)


def _record(bundle: Path, figures: dict[str, Any]) -> None:
    from patchforge.model.shipped import bundle_folder
    from patchforge.model.storage.bundle import read_manifest, write_manifest

    folder = bundle_folder(bundle)
    manifest = read_manifest(folder)
    kept = {name: each for name, each in manifest.evaluation.items() if name == "budgets"}  # of `bench budget`
    write_manifest(folder, manifest.model_copy(update={"evaluation": figures | kept}))


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

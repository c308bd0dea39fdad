"""`patchforge bench sampler`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.plots import plot_samplers
from patchforge.service.cli.report import print_table, write_json, write_table
from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.samplers import PRESETS, Adaptive, Quality, preset

if TYPE_CHECKING:
    from patchforge.model.evaluation.frechet import Interval
    from patchforge.model.experiments.sampler_bench import Configuration, Gallery, Row, SamplerBench
    from patchforge.model.pipeline import Pipeline

PROMPTS = (
    "red apple",
    "grinning face",
    "dog face",
    "blue heart",
    "automobile",
    "one oclock",
    "tulip",
    "pizza",
)


INTERVAL = "uniform, guidance interval"
FAMILIES = "paper", "uniform", INTERVAL, "paper, cheaper", "adaptive", "adaptive, in part"
SHARES = 0.5, 0.75, 1, 1.25, 1.5
"""Steps of the uniform samplers in the guidance interval, as shares of those of `standard`."""
REAL = "real pictures of the same concepts in another style; FD of the prompts' own"
COSTS = "sampler", "patch evaluations", "saved", "seconds", "GFLOP", "floor, s", "PSNR, dB", "finished by t = 0.5"
QUALITY = "found first", "cosine", "cosine − first row's", "sharpness", "FD", "FD − first row's", "worse in"
VERDICT = "ours", "beside", "patch evaluations", "seconds"
AS_GOOD = (
    "ours",
    "family",
    "the cheapest as good",
    "its cosine − ours",
    "its sharpness − ours",
    "evaluations",
    "seconds",
)
LEAPS = "steps", "t", "measured", "÷ both, geometric mean", "÷ bend alone", "÷ variance alone", "rank correlation"


def sampler(
    bundle: options.Bundle = Path("emoji-text"),
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompts or class names; default: eight prompts, or every eighth class.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Picture table: draw prompts from it, and measure quality too.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--sampler", help="Samplers to measure; default: all.")] = None,
    families: Annotated[
        list[str] | None, typer.Option("--family", help=f"Families to measure: {', '.join(FAMILIES)}. Default: all.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=32, help="Number of prompts to draw from --data, roughly.")] = 98,
    tune: Annotated[
        bool, typer.Option("--tune", help="Use the half of the concepts on which presets are chosen.")
    ] = False,
    judge: options.Judge = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    out: options.Json = None,
    plot: options.Plot = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Compare samplers on the same prompts and noise: patch evaluations, seconds, FLOPs, PSNR; with --data, quality."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.experiments.sampler_bench import PAPER, PAPER_CHEAPER, UNIFORM, SamplerBench
    from patchforge.model.pipeline import Pipeline

    prepare_cpu(threads)
    with typed_errors():
        if unknown := sorted(set(families or ()) - set(FAMILIES)):
            raise InvalidRequest(f"there is no family {unknown[0]!r}: {', '.join(FAMILIES)}", field="family")
        pipeline = Pipeline.open(bundle)
        wanted = prompt or list(pipeline.manifest.class_names[::8]) or list(PROMPTS)
        gallery = None
        if data is not None:
            wanted, gallery = make_gallery(pipeline, data, pictures, tune, judge)
        chosen = pipeline.manifest.defaults.guidance if guidance is None else guidance
        bench = SamplerBench(pipeline, wanted, chosen, gallery, seed)
        every = {
            "paper": PAPER if gallery else (),
            "uniform": UNIFORM,
            INTERVAL: _uniform_with_interval(pipeline),
            "paper, cheaper": PAPER_CHEAPER,
            "adaptive": _list_presets(pipeline),
            "adaptive, in part": _parts_of_adaptive(pipeline),
        }
        rows: dict[str, list[Row]] = {}
        for family, configurations in every.items():
            rows[family] = []
            if families and family not in families:
                continue
            for row in bench.measure([found for found in configurations if not only or found.sampler in only]):
                rows[family].append(row)
                Console().print(f"{row.sampler} {row.options}: {row.seconds:.2f} s per picture", style="dim")
        title = f"{bundle.name}, {len(wanted)} pictures, guidance {chosen:g}; figures per picture"
        tables = _make_tables(bench, pipeline, rows, title)
        for _, table_title, columns, lines in tables:
            print_table(table_title, columns, lines)
        if out is not None:
            write_json(out, [{"family": family} | asdict(row) for family, some in rows.items() for row in some])
        if doc is not None:
            for name, _, columns, lines in tables:
                write_table(doc, name, columns, lines)
        if plot is not None:
            plot_samplers(rows, plot)


def _make_tables(
    bench: SamplerBench, pipeline: Pipeline, rows: dict[str, list[Row]], title: str
) -> list[tuple[str, str, Sequence[str], list[list[str]]]]:
    """Name of the marks in the page, title, columns and lines of every table that has lines."""
    columns, lines = table_of(rows)
    if bench.gallery is not None and (floor := bench.gallery.lineup.floor()):
        cells = _percent(floor["found first"]), str(floor["cosine"]), "", "", str(floor["distance"]), "", ""
        lines.append([REAL, *[""] * (len(COSTS) - 1), *cells])
    as_good = as_good_lines(bench, rows) if bench.gallery is not None else []
    leaps = leap_lines(bench, pipeline)
    tables: list[tuple[str, str, Sequence[str], list[list[str]]]] = [
        ("samplers", title, columns, lines),
        ("sampler verdict", "Cost of ours as a share of the cost of others", VERDICT, verdict_lines(rows)),
        ("uniform as good", "Cost of ours beside uniform samplers of the same quality", AS_GOOD, as_good),
        ("leaps", "Adaptive's prediction of the error of a leap to t = 1", LEAPS, leaps),
    ]
    return [table for table in tables if table[-1] or table[0] in ("samplers", "leaps")]


def _list_presets(pipeline: Pipeline) -> list[Configuration]:
    """The quality presets as this model serves them."""
    from patchforge.service.worker.cards import model_card

    card = model_card(pipeline.manifest)
    return [_configuration(*preset(quality, card.sampler, card.steps)) for quality in PRESETS]


def _configuration(chosen: Adaptive, steps: int) -> Configuration:
    from patchforge.model.experiments.sampler_bench import Configuration

    return Configuration("adaptive", {"steps": steps} | chosen.model_dump(exclude={"name"}))


def standard_configuration(pipeline: Pipeline) -> Configuration:
    """What the preset `standard` means for this model."""
    return _configuration(*_standard(pipeline))


def _parts_of_adaptive(pipeline: Pipeline) -> list[Configuration]:
    """Adaptive with one part left out: skipping, finishing, the guidance interval, the small picture at first."""
    standard, steps = _standard(pipeline)
    throughout = {"guidance_from": 0.0, "guidance_until": 1.0}
    parts: tuple[dict[str, float], ...] = ({"skip_tolerance": 0.0}, {"tolerance": 0.0}, throughout)
    if standard.small_until:
        parts += ({"small_until": 0.0},)
    return [_configuration(standard.model_copy(update=part), steps) for part in parts]


def _uniform_with_interval(pipeline: Pipeline) -> list[Configuration]:
    """Uniform steps of first and second order in the model's guidance interval: adaptive, but all patches alike.

    If the model's pictures are small at first, so are half of these.
    """
    standard, steps = _standard(pipeline)
    uniform = standard.model_copy(update={"tolerance": 0.0, "skip_tolerance": 0.0})
    kinds = [
        uniform.model_copy(update={"order": order, "small_until": until})
        for until in dict.fromkeys([0.0, standard.small_until])
        for order in (1, 2)
    ]
    counts = sorted({max(1, round(share * steps)) for share in SHARES})
    return [_configuration(each, count) for each in kinds for count in counts]


def _standard(pipeline: Pipeline) -> tuple[Adaptive, int]:
    from patchforge.service.worker.cards import model_card

    card = model_card(pipeline.manifest)
    return preset(Quality.STANDARD, card.sampler, card.steps)


def make_gallery(
    pipeline: Pipeline, data: Path, count: int, tune: bool, judge_folder: Path | None
) -> tuple[list[str], Gallery]:
    """Prompts of trained pictures, as many of each style, with what the judges compare generated pictures with.

    Raises:
        InvalidRequest: the model takes no prompts.
    """
    from patchforge.model.evaluation.frechet import Gaussian
    from patchforge.model.evaluation.judge import SHIPPED, Judge
    from patchforge.model.evaluation.lineup import make_lineup
    from patchforge.model.evaluation.outside import OutsideJudge
    from patchforge.model.evaluation.samples import words_for
    from patchforge.model.experiments.sampler_bench import Gallery
    from patchforge.model.storage.manifest import ClassNetwork
    from patchforge.model.training.data import Pictures

    if isinstance(pipeline.manifest.network, ClassNetwork):
        raise InvalidRequest(
            "requires a text-to-image bundle, because the judges look for a prompt's picture", field="data"
        )
    judge, outside = Judge.load(judge_folder or SHIPPED), OutsideJudge()
    table = Pictures.load(data).resized(pipeline.manifest.size[0])
    lineup = make_lineup(table, outside, count, half="tune" if tune else "report")
    asked = set(lineup.asked.concepts)
    others = table.where(table.trained() & [concept not in asked for concept in table.concepts])
    words = words_for(pipeline, lineup.asked)
    real = Gaussian.of(judge.features(others.images))
    return words, Gallery(lineup, outside, judge, real, judge.embed(words))


def table_of(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines; quality columns only if quality was measured."""
    every = [row for some in rows.values() for row in some]
    measured = any(row.quality for row in every)
    return [*COSTS, *(QUALITY if measured else ())], [_row_cells(row) for row in every]


def _row_cells(row: Row) -> list[str]:
    figures = [f"{row.patch_evaluations:.0f}", f"{row.saved:.1%}", f"{row.seconds:.3f}", f"{row.gflop:.1f}"]
    figures += [f"{row.floor_seconds:.3f}", f"{row.psnr:.1f}", f"{row.finished_half_way:.0%}"]
    if row.quality is not None:
        found, less = row.quality.figures, row.quality.differences
        figures += [
            _percent(found["found first"]),
            f"{found['cosine'].value:.3f}",
            str(less["cosine"]) if less else "–",
        ]
        figures += [f"{found['sharpness'].value:.2f}", f"{found['distance'].value:.1f}"]
        figures += [str(less["distance"]) if less else "–", ", ".join(row.quality.worse) if less else "–"]
    return [_name(row), *figures]


def _percent(share: Interval) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def _name(row: Row) -> str:
    """Sampler and options; adaptive's default options are left out."""
    usual = Adaptive().model_dump() if row.sampler == "adaptive" else {}
    return " ".join([row.sampler, *(f"{key}={value}" for key, value in row.options.items() if usual.get(key) != value)])


def leap_lines(bench: SamplerBench, pipeline: Pipeline) -> list[list[str]]:
    """One line per time from which patches may leap, with the steps and guidance interval of every preset."""
    from patchforge.model.experiments.leap import measure_leaps
    from patchforge.model.samplers import Adaptive as AdaptiveSampler

    lines = []
    for configuration in _list_presets(pipeline):
        options = configuration.options | {"small_until": 0.0}  # leaps at full size, from every time
        served = pipeline.sampler("adaptive", guidance=bench.guidance, **options)
        assert isinstance(served, AdaptiveSampler)
        for leap in measure_leaps(pipeline, bench.conditions, bench.seeds, served):
            ratios = map(str, (leap.by_both, leap.by_bend, leap.by_variance, leap.rank))
            lines.append([str(leap.steps), f"{leap.time:.2f}", f"{leap.measured:.3f}", *ratios])
    return lines


def verdict_lines(rows: dict[str, list[Row]]) -> list[list[str]]:
    """Cost of every preset beside the paper's best sampler and beside the cheapest equal uniform sampler.

    Only presets that are `indistinguishable` from the first row measured. Empty if a family was left out.
    """
    from patchforge.model.experiments.sampler_bench import cheapest_equal

    if not all(rows.values()):
        return []
    paper = max(rows["paper"], key=lambda row: row.quality.figures["cosine"].value if row.quality else 0.0)
    others = {"the paper's best at 100 network evaluations": paper}
    for family in ("uniform", INTERVAL):
        if (cheapest := cheapest_equal(rows[family])) is not None:
            others[f"the cheapest equal {family}"] = cheapest
    presets = list(zip(PRESETS, rows["adaptive"], strict=True))
    return [
        [
            quality.value,
            f"{name}: {_name(other)}",
            f"{row.patch_evaluations / other.patch_evaluations:.1%}",
            f"{row.seconds / other.seconds:.1%}",
        ]
        for quality, row in presets
        if row.quality is not None and row.quality.indistinguishable
        for name, other in others.items()
    ]


def as_good_lines(bench: SamplerBench, rows: dict[str, list[Row]]) -> list[list[str]]:
    """Cost of every preset beside the cheapest sampler of each uniform family that is not worse in any figure."""
    lines: list[list[str]] = []
    for quality, row in zip(PRESETS, rows["adaptive"], strict=False):  # no rows if adaptive was left out
        for family in ("uniform", INTERVAL):
            if not rows[family]:
                continue
            if (found := bench.cheapest_as_good(rows[family], row)) is None:
                lines.append([quality.value, family, "none", *[""] * (len(AS_GOOD) - 3)])
                continue
            other, less = found
            shares = [f"{row.patch_evaluations / other.patch_evaluations:.1%}", f"{row.seconds / other.seconds:.1%}"]
            lines.append([quality.value, family, _name(other), str(less["cosine"]), str(less["sharpness"]), *shares])
    return lines

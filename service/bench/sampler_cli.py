"""``patchforge bench sampler``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.bench_plots import plot_samplers
from service.cli_errors import typed_errors
from service.document import replace_between
from service.errors import InvalidRequest
from service.sampler_options import PRESETS, Adaptive, Quality, preset

if TYPE_CHECKING:
    from model.evaluation.sampler_bench import Configuration, Gallery, Row, SamplerBench
    from model.pipeline import Pipeline

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


REAL = "real pictures of the same prompts"
COSTS = "sampler", "patch evaluations", "saved", "seconds", "GFLOP", "floor, s", "PSNR, dB", "finished by half"
QUALITY = "FD", "FD − paper's", "top 1", "top 5", "top 5 − paper's"
VERDICT = "ours", "beside", "patch evaluations", "seconds"
AS_GOOD = "ours", "the cheapest uniform as good", "its FD − ours", "its top 5 − ours", "patch evaluations", "seconds"
LEAPS = "steps", "t", "measured", "÷ both, geometric mean", "÷ bend alone", "÷ variance alone", "rank correlation"


def sampler(
    bundle: Annotated[Path, typer.Argument(help="Folder of a model bundle.")] = Path("model/bundles/emoji-text"),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts or class names; default: a few, or all.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A picture table: prompts are drawn from it, and quality is measured too.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--sampler", help="Only these samplers; default: all.")] = None,
    pictures: Annotated[int, typer.Option(min=32, help="How many prompts to draw from `--data`.")] = 96,
    guidance: Annotated[float | None, typer.Option(help="Default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture's noise; the next count up.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .png or .svg.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Put the tables into this page, between their marks.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every core.")] = None,
) -> None:
    """Samplers on the same prompts and noise: patch evaluations, seconds, FLOPs, PSNR; with --data, quality."""
    from model.device import prepare_cpu
    from model.evaluation.sampler_bench import PAPER, PAPER_CHEAPER, UNIFORM, SamplerBench
    from model.pipeline import Pipeline

    prepare_cpu(threads)
    console = Console(width=150)
    with typed_errors():
        pipeline = Pipeline.open(bundle)
        wanted = prompt or list(pipeline.manifest.class_names[::8]) or list(PROMPTS)
        gallery = None
        if data is not None:
            wanted, gallery = _gallery(pipeline, data, pictures)
        chosen = pipeline.manifest.defaults.guidance if guidance is None else guidance
        bench = SamplerBench(pipeline, wanted, chosen, gallery, seed)
        families = {
            "paper": PAPER if gallery else (),
            "uniform": UNIFORM,
            "uniform, guidance interval": _guided_in_part(pipeline),
            "paper, cheaper": PAPER_CHEAPER,
            "adaptive": _presets(pipeline),
            "adaptive, in part": _parts(pipeline),
        }
        rows: dict[str, list[Row]] = {}
        for family, configurations in families.items():
            rows[family] = []
            for row in bench.measure([each for each in configurations if not only or each.sampler in only]):
                rows[family].append(row)
                console.print(f"{row.sampler} {row.options}: {row.seconds:.2f} s a picture", style="dim")
        columns, lines = table_of(rows)
        if gallery is not None:
            lines.append([REAL, *[""] * (len(COSTS) - 1), str(gallery.floor), *[""] * (len(QUALITY) - 1)])
        verdict = verdict_lines(rows)
        console.print(
            _shown(f"{bundle.name}, {len(wanted)} pictures, guidance {chosen:g}; per picture", columns, lines)
        )
        if verdict:
            console.print(_shown("What ours costs, as a share of what others cost", VERDICT, verdict))
        as_good = as_good_lines(bench, rows) if gallery is not None else []
        if as_good:
            console.print(_shown("What ours costs beside uniform samplers as good", AS_GOOD, as_good))
        leaps = leap_lines(bench, pipeline)
        console.print(_shown("Adaptive's prediction of the error of leaping to t = 1", LEAPS, leaps))
        if out is not None:
            flat = [{"family": family} | asdict(row) for family, some in rows.items() for row in some]
            out.write_text(json.dumps(flat, indent=1) + "\n")
        if doc is not None:
            replace_between(doc, "samplers", columns, lines)
            if verdict:
                replace_between(doc, "sampler verdict", VERDICT, verdict)
            if as_good:
                replace_between(doc, "uniform as good", AS_GOOD, as_good)
            replace_between(doc, "leaps", LEAPS, leaps)
        if plot is not None:
            plot_samplers(rows, plot)


def _presets(pipeline: Pipeline) -> list[Configuration]:
    """The presets as this model serves them."""
    from service.worker.cards import model_card

    card = model_card(pipeline.manifest)
    return [_configuration(*preset(quality, card.sampler, card.steps)) for quality in PRESETS]


def _configuration(chosen: Adaptive, steps: int) -> Configuration:
    from model.evaluation.sampler_bench import Configuration

    return Configuration("adaptive", {"steps": steps} | chosen.model_dump(exclude={"name"}))


def _parts(pipeline: Pipeline) -> list[Configuration]:
    """What each part of adaptive does by itself: finishing, skipping, and both without a guidance interval."""
    standard, steps = _standard(pipeline)
    throughout = {"guidance_from": 0.0, "guidance_until": 1.0}
    parts: tuple[dict[str, float], ...] = ({"skip_tolerance": 0.0}, {"tolerance": 0.0}, throughout)
    return [_configuration(standard.model_copy(update=part), steps) for part in parts]


def _guided_in_part(pipeline: Pipeline) -> list[Configuration]:
    """Uniform steps, of first and second order, in the guidance interval of the model's own choice: all that adaptive
    does, but nothing by patch."""
    standard, _ = _standard(pipeline)
    uniform = standard.model_copy(update={"tolerance": 0.0, "skip_tolerance": 0.0})
    return [
        _configuration(uniform.model_copy(update={"order": order}), steps) for order in (1, 2) for steps in (3, 4, 5, 6)
    ]


def _standard(pipeline: Pipeline) -> tuple[Adaptive, int]:
    from service.worker.cards import model_card

    card = model_card(pipeline.manifest)
    return preset(Quality.STANDARD, card.sampler, card.steps)


def _gallery(pipeline: Pipeline, data: Path, count: int) -> tuple[list[str], Gallery]:
    """Prompts drawn by weight from pictures the model was trained on, and the real pictures of the other half."""
    import torch

    from model.evaluation.frechet import Gaussian, frechet_interval
    from model.evaluation.judge import Judge
    from model.evaluation.quality import split_pictures
    from model.evaluation.sampler_bench import Gallery
    from model.evaluation.samples import words_for
    from model.manifest import ClassNetwork
    from model.training.data import Pictures

    if isinstance(pipeline.manifest.network, ClassNetwork):
        raise InvalidRequest("the judge ranks prompts: give a text-to-image bundle", field="data")
    split, judge = split_pictures(Pictures.load(data), count), Judge.load()
    real = Gaussian.of(judge.features(split.reference.images), torch.from_numpy(split.reference.weights))
    floor = frechet_interval(real, judge.features(split.real.images))
    return words_for(pipeline, split.real), Gallery(judge, real, split.real.concepts, floor)


def table_of(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines; those of quality only where it was measured."""
    every = [row for some in rows.values() for row in some]
    measured = any(row.quality for row in every)
    return [*COSTS, *(QUALITY if measured else ())], [_line(row) for row in every]


def _line(row: Row) -> list[str]:
    figures = [f"{row.patch_evaluations:.0f}", f"{row.saved:.1%}", f"{row.seconds:.3f}", f"{row.gflop:.1f}"]
    figures += [f"{row.floor_seconds:.3f}", f"{row.psnr:.1f}", f"{row.finished_by_half:.0%}"]
    if row.quality is not None:
        figures += [str(row.quality.distance), str(row.quality.difference or "–")]
        figures += [f"{row.quality.top1.value:.0%}", f"{row.quality.top5.value:.0%}"]
        figures.append("–" if row.quality.top5_difference is None else str(row.quality.top5_difference))
    return [_name(row), *figures]


def _name(row: Row) -> str:
    """Sampler and options, without adaptive's usual ones."""
    usual = Adaptive().model_dump() if row.sampler == "adaptive" else {}
    return " ".join([row.sampler, *(f"{key}={value}" for key, value in row.options.items() if usual.get(key) != value)])


def leap_lines(bench: SamplerBench, pipeline: Pipeline) -> list[list[str]]:
    """One line a time from which patches might leap, in the steps and guidance interval of each preset."""
    from model.evaluation.leap import measure_leaps
    from model.samplers import Adaptive as AdaptiveSampler

    lines = []
    for configuration in _presets(pipeline):
        served = pipeline.sampler("adaptive", guidance=bench.guidance, **configuration.options)
        assert isinstance(served, AdaptiveSampler)
        for each in measure_leaps(pipeline, bench.conditions, bench.seeds, served):
            ratios = map(str, (each.by_both, each.by_bend, each.by_variance, each.rank))
            lines.append([str(each.steps), f"{each.time:.2f}", f"{each.measured:.3f}", *ratios])
    return lines


def _shown(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*line)
    return table


def verdict_lines(rows: dict[str, list[Row]]) -> list[list[str]]:
    """What each equal preset costs beside the paper's best, and beside the cheapest equal of the uniform samplers.

    Equal is what is `not_told` from the first row measured. Nothing where a family was left out.
    """
    from model.evaluation.sampler_bench import cheapest_equal

    if not all(rows.values()):
        return []
    paper = min(rows["paper"], key=lambda row: row.quality.distance.value if row.quality else 0.0)
    others = {"the paper's best at 100 network evaluations": paper}
    for family in ("uniform", "uniform, guidance interval"):
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
        if row.quality is not None and row.quality.not_told
        for name, other in others.items()
    ]


def as_good_lines(bench: SamplerBench, rows: dict[str, list[Row]]) -> list[list[str]]:
    """What each preset costs beside the cheapest uniform sampler whose pictures are not told from the preset's own."""
    if not rows["uniform"]:
        return []
    lines: list[list[str]] = []
    for quality, row in zip(PRESETS, rows["adaptive"], strict=False):  # none, where adaptive was left out
        if (found := bench.cheapest_as_good(rows["uniform"], row)) is None:
            lines.append([quality.value, "none", *[""] * (len(AS_GOOD) - 2)])
            continue
        other, distance, among_five = found
        shares = (row.patch_evaluations / other.patch_evaluations, row.seconds / other.seconds)
        lines.append([quality.value, _name(other), str(distance), str(among_five), *(f"{each:.1%}" for each in shares)])
    return lines

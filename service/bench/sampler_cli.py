"""``patchforge bench sampler``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.bench_plots import plot_samplers
from service.cli_errors import typed_errors
from service.errors import InvalidRequest
from service.schemas import PRESETS, Adaptive, preset

if TYPE_CHECKING:
    from model.evaluation.sampler_bench import Configuration, Gallery, Row
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


def sampler(
    bundle: Annotated[Path, typer.Argument(help="Folder of a model bundle.")] = Path("model/bundles/emoji-text"),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts or class names; default: a few, or all.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A picture table: prompts are drawn from it, and quality is measured too.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--sampler", help="Only these samplers; default: all.")] = None,
    pictures: Annotated[int, typer.Option(min=32, help="How many prompts to draw from `--data`.")] = 96,
    guidance: Annotated[float | None, typer.Option(help="Default: the bundle's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .png or .svg.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every core.")] = None,
) -> None:
    """Samplers on the same prompts and noise: patch evaluations, seconds, FLOPs, PSNR; with --data, quality."""
    from model.device import use_threads
    from model.evaluation.sampler_bench import PAPER, PAPER_CHEAPER, UNIFORM, SamplerBench
    from model.pipeline import Pipeline

    use_threads(threads)
    console = Console(width=150)
    with typed_errors():
        pipeline = Pipeline.open(bundle)
        wanted = prompt or list(pipeline.manifest.class_names[::8]) or list(PROMPTS)
        gallery = None
        if data is not None:
            wanted, gallery = _gallery(pipeline, data, pictures)
        chosen = pipeline.manifest.defaults.guidance if guidance is None else guidance
        bench = SamplerBench(pipeline, wanted, chosen, gallery)
        families = {"paper": PAPER if gallery else (), "uniform": UNIFORM}
        families |= {"paper, cheaper": PAPER_CHEAPER, "adaptive": _adaptive(pipeline)}
        rows: dict[str, list[Row]] = {}
        for family, configurations in families.items():
            rows[family] = []
            for row in bench.measure([each for each in configurations if not only or each.sampler in only]):
                rows[family].append(row)
                console.print(f"{row.sampler} {row.options}: {row.seconds:.2f} s a picture", style="dim")
        console.print(_table(f"{bundle.name}, {len(wanted)} pictures, guidance {chosen:g}; per picture", rows))
        if gallery is not None and all(rows.values()):
            _verdict(console, rows)
        if out is not None:
            flat = [{"family": family} | asdict(row) for family, some in rows.items() for row in some]
            out.write_text(json.dumps(flat, indent=1) + "\n")
        if plot is not None:
            plot_samplers(rows, plot)


def _adaptive(pipeline: Pipeline) -> tuple[Configuration, ...]:
    """The presets as this model serves them, then what each part of them does by itself."""
    from model.evaluation.sampler_bench import Configuration

    choice = pipeline.manifest.defaults.sampler.model_dump()
    usual = Adaptive(**choice) if choice["name"] == "adaptive" else Adaptive()
    configurations = []
    for quality in PRESETS:
        chosen, steps = preset(quality, usual)
        configurations.append(Configuration("adaptive", {"steps": steps} | chosen.model_dump(exclude={"name"})))
    plain = {"steps": 8, "tolerance": 0.0, "skip_tolerance": 0.0}
    parts = ({"tolerance": 0.15}, {"skip_tolerance": 0.02}, {"guidance_until": 0.5}, {"tolerance": 0.15, "steps": 6})
    for part in parts:
        configurations.append(Configuration("adaptive", plain | part))
    return tuple(configurations)


def _gallery(pipeline: Pipeline, data: Path, count: int) -> tuple[list[str], Gallery]:
    """Prompts drawn by weight from pictures the model was trained on, and the real pictures of the other half."""
    import torch

    from model.evaluation.frechet import Gaussian
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
    return words_for(pipeline, split.real), Gallery(judge, real, split.real.concepts)


def _table(title: str, rows: dict[str, list[Row]]) -> Table:
    table = Table("sampler", "patch evals", "saved", "seconds", "GFLOP", "floor s", title=title)
    for name in ("PSNR dB", "done by half", "FD", "FD − paper's best", "top 1", "top 5"):
        table.add_column(name)
    for some in rows.values():
        for row in some:
            usual = Adaptive().model_dump() if row.sampler == "adaptive" else {}
            options = " ".join(f"{key}={value}" for key, value in row.options.items() if usual.get(key) != value)
            figures = [f"{row.patch_evaluations:.0f}", f"{row.saved:.1%}", f"{row.seconds:.3f}", f"{row.gflop:.1f}"]
            figures += [f"{row.floor_seconds:.3f}", f"{row.psnr:.1f}", f"{row.finished_by_half:.0%}"]
            if row.quality is not None:
                figures += [str(row.quality.distance), str(row.quality.difference or "–")]
                figures += [f"{row.quality.top1.value:.0%}", str(row.quality.top5)]
            table.add_row(f"{row.sampler} {options}", *figures)
        table.add_section()
    return table


def _verdict(console: Console, rows: dict[str, list[Row]]) -> None:
    """What the adaptive sampler needs for pictures not told from the paper's, beside the best uniform sampler."""
    from model.evaluation.sampler_bench import cheapest_equal

    paper = min(rows["paper"], key=lambda row: row.quality.distance.value if row.quality else 0.0)
    ours, uniform = cheapest_equal(rows["adaptive"]), cheapest_equal(rows["uniform"])
    console.print(
        f"the paper's best at 100 network evaluations is {paper.sampler}: {paper.patch_evaluations:.0f} of patches"
    )
    if ours is None or uniform is None:
        console.print("no configuration, or no uniform one, makes pictures that are not told from those")
        return
    for name, other in (("the paper's best", paper), ("the cheapest equal uniform sampler", uniform)):
        console.print(
            f"{ours.sampler} {ours.options} against {name} ({other.sampler} {other.options}): "
            f"{ours.patch_evaluations / other.patch_evaluations:.1%} of the patch evaluations, "
            f"{ours.seconds / other.seconds:.1%} of the seconds"
        )

"""`patchforge bench precision`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchforge.service.cli import options
from patchforge.service.cli.bench.sampler import make_gallery, standard_configuration
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table, write_json, write_table

if TYPE_CHECKING:
    from patchforge.model.experiments.precision_bench import PrecisionRow

COLUMNS = "", "float32", "bfloat16", "bfloat16 − float32"


def precision(
    data: Annotated[Path, typer.Option(help="Picture table: prompts are drawn from it.")],
    bundle: options.Bundle = Path("emoji-text"),
    pictures: Annotated[int, typer.Option(min=32, help="Number of prompts to draw from --data, roughly.")] = 98,
    judge: options.Judge = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    out: options.Json = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Compare pictures in bf16 with those in float32: quality by the judges, time, and what packing changes."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.experiments.precision_bench import bench_precision
    from patchforge.model.pipeline import Pipeline

    prepare_cpu(threads)
    with typed_errors():
        pipeline = Pipeline.open(bundle)
        words, gallery = make_gallery(pipeline, data, pictures, tune=False, judge_folder=judge)
        chosen = pipeline.manifest.defaults.guidance if guidance is None else guidance
        row = bench_precision(bundle, words, gallery, standard_configuration(pipeline), chosen, seed)
        lines = _lines(row)
        title = (
            f"{pipeline.manifest.name}, {len(words)} pictures, standard; worse in bf16: {', '.join(row.worse) or '–'}"
        )
        print_table(title, COLUMNS, lines)
        if doc is not None:
            write_table(doc, f"precision, {pipeline.manifest.name}", COLUMNS, lines)
        if out is not None:
            write_json(out, _figures(row))


def _lines(row: PrecisionRow) -> list[list[str]]:
    first, other = row.float32, row.bfloat16
    lines = [
        [name, str(value), "", str(row.differences[name]) + (", worse" if name in row.worse else "")]
        for name, value in row.figures.items()
    ]
    seconds = first.processor_seconds, other.processor_seconds
    return [
        *lines,
        ["PSNR to float32, dB", "", f"{row.psnr:.1f}", ""],
        [
            "sampling and decoding, CPU s",
            *(f"{value:.3f}" for value in seconds),
            f"{seconds[0] / seconds[1]:.2f}× as fast",
        ],
        ["pictures that packing changes", *(f"{each.packed_differs:.0%}" for each in (first, other)), ""],
        ["most that it changes a pixel, of 255", str(first.packed_most), str(other.packed_most), ""],
    ]


def _figures(row: PrecisionRow) -> dict[str, Any]:
    drawn = {
        each.precision: {k: v for k, v in vars(each).items() if k != "pictures"} for each in (row.float32, row.bfloat16)
    }
    figures, differences = (
        {name: each.rounded() for name, each in some.items()} for some in (row.figures, row.differences)
    )
    return drawn | {"psnr": row.psnr, "figures": figures, "differences": differences, "worse": row.worse}

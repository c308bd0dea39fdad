"""``patchforge bench``: measurements, each against its baseline in the same run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.bench.claims_cli import claims
from service.bench.engine_cli import engine
from service.bench.forward_cli import forward
from service.bench.gateway_cli import gateway
from service.cli_errors import typed_errors

bench_app = typer.Typer(help="Measure, each time against a baseline in the same run.", no_args_is_help=True)

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


bench_app.command("forward")(forward)
bench_app.command("engine")(engine)
bench_app.command("gateway")(gateway)
bench_app.command("claims")(claims)


@bench_app.command("sampler")
def sampler(
    bundle: Annotated[Path, typer.Argument(help="Folder of a model bundle.")] = Path("model/bundles/emoji-text"),
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts or class names; default: a few, or all.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: the bundle's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: every core.")] = None,
) -> None:
    """Samplers on the same prompts and noise: patch evaluations, seconds, FLOPs, PSNR against a fine solution."""
    from model.device import use_threads
    from model.evaluation.sampler_bench import bench_samplers
    from model.pipeline import Pipeline

    use_threads(threads)
    with typed_errors():
        pipeline = Pipeline.open(bundle)
        wanted = prompt or list(pipeline.manifest.class_names[::8]) or list(PROMPTS)
        chosen = pipeline.manifest.defaults.guidance if guidance is None else guidance
        rows = list(bench_samplers(pipeline, wanted, chosen))
    title = f"{bundle.name}, {len(wanted)} pictures packed together, guidance {chosen:g}; all per picture"
    table = Table("sampler", "patch evals", "saved", "seconds", "GFLOP", "floor s", "PSNR dB", title=title)
    for row in rows:
        options = " ".join(f"{key}={value}" for key, value in row.options.items())
        figures = (f"{row.patch_evaluations:.0f}", f"{row.saved:.1%}", f"{row.seconds:.3f}", f"{row.gflop:.1f}")
        table.add_row(f"{row.sampler} {options}", *figures, f"{row.floor_seconds:.3f}", f"{row.psnr:.1f}")
    Console(width=120).print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")

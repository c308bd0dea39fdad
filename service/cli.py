"""The command line: ``patchforge …``."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.table import Table

from service.bench_cli import bench_app
from service.cli_errors import typed_errors
from service.evaluation_cli import evaluate, grid
from service.generate_cli import generate
from service.settings import KEY_NAME, Settings
from service.soak.command import soak
from service.training_cli import data_app, train_app

app = typer.Typer(
    name="patchforge",
    help="Serve Patch Forcing image generation: every patch has its own noise level, so easy regions finish early.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")
app.command()(generate)
app.command("eval")(evaluate)
app.command("grid")(grid)
app.command("soak")(soak)
errors = Console(stderr=True, highlight=False)

OutOption = Annotated[Path, typer.Option("--out", help="Where to write.")]


@app.command()
def serve() -> None:
    """Everything on this machine: gateway, worker and, unless REDIS_URL is set, an embedded queue server."""
    from service.logs import configure_logs
    from service.supervisor import serve as run
    from service.tracing import traced

    settings = _settings()
    configure_logs(settings, "gateway")
    with typed_errors(), traced("gateway"):
        asyncio.run(run(settings))


@app.command()
def gateway() -> None:
    """Only the HTTP and gRPC gateway, against REDIS_URL."""
    from service.gateway.app import serve_gateway
    from service.logs import configure_logs
    from service.tracing import traced

    settings = _settings()
    _redis_url(settings)
    configure_logs(settings, "gateway")
    with typed_errors(), traced("gateway"):
        asyncio.run(serve_gateway(settings))


@app.command()
def worker(parent: Annotated[int | None, typer.Option(hidden=True)] = None) -> None:
    """Only a worker, against REDIS_URL; start as many as there are devices."""
    from service.logs import configure_logs
    from service.tracing import traced
    from service.worker.main import serve_worker

    settings = _settings()
    url = _redis_url(settings)
    configure_logs(settings, "worker")
    with typed_errors(), traced("worker"):
        asyncio.run(serve_worker(settings, url, parent))


@app.command("hash-key")
def hash_key(name: Annotated[str, typer.Argument(help="Who will use it: their jobs are theirs alone.")]) -> None:
    """Make an API key: the secret to hand over, and the entry that admits it."""
    from service.api_keys import entry, new_key

    if not re.fullmatch(KEY_NAME, name):
        raise typer.BadParameter("letters, digits, `.`, `_` and `-` only, at most 64", param_hint="NAME")
    key = new_key()
    print(f"key    {key}")
    print(f"entry  {entry(name, key)}")
    errors.print(
        "The key is shown this once. Add the entry to PATCHFORGE_API_KEYS (commas between) and restart.", soft_wrap=True
    )


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A golden .safetensors file: weights, inputs, outputs, config.")],
    tolerance: Annotated[float, typer.Option(help="Largest absolute difference allowed.")] = 1e-4,
) -> None:
    """Check networks and samplers against golden vectors; exit status 1 if any differs."""
    from model.verify import verify as compare

    table = Table("key", "alone", "packed", "ok", title=str(file))
    worst = 0.0
    with typed_errors():
        for difference in compare(file):
            worst = max(worst, difference.worst)
            packed = "" if difference.packed is None else f"{difference.packed:.1e}"
            ok = "yes" if difference.worst <= tolerance else "NO"
            table.add_row(difference.key, f"{difference.alone:.1e}", packed, ok)
    Console(width=100).print(table)
    print(f"largest difference {worst:.2e}, tolerance {tolerance:.0e}")
    if not worst <= tolerance:
        raise typer.Exit(1)


@app.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A released .ckpt; its pickled code is never run.")],
    autoencoder: Annotated[Path, typer.Option(help="A diffusers AutoencoderKL folder with safetensors weights.")],
    out: OutOption,
    name: Annotated[str | None, typer.Option(help="The model's name; default: the output folder's.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="One class name a line; default: their numbers.")] = None,
    licence: Annotated[str | None, typer.Option(help="Default: that of the paper's released checkpoints.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="If the checkpoint does not say.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the stored weights.")
    ] = "float32",
) -> None:
    """Turn a released checkpoint into a bundle that can be served."""
    import torch

    from model.import_checkpoint import LICENCE
    from model.import_checkpoint import import_checkpoint as run

    with typed_errors():
        manifest = run(
            checkpoint,
            autoencoder,
            out,
            dtype=getattr(torch, dtype),
            progress=errors.print,
            name=name,
            class_names=class_names,
            licence=licence or LICENCE,
            num_heads=num_heads,
        )
        print(f"{out}: {manifest.name}, {manifest.network.kind}-conditional")


def _settings() -> Settings:
    """From the environment; a bad value is one clear line, exit status 2."""
    try:
        return Settings()
    except (ValidationError, SettingsError) as error:
        errors.print(f"error: a PATCHFORGE_… setting cannot be used: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _redis_url(settings: Settings) -> str:
    if settings.redis_url is None:
        errors.print("REDIS_URL is not set; `patchforge serve` runs everything with an embedded queue server")
        raise typer.Exit(2)
    return settings.redis_url


if __name__ == "__main__":
    app()

"""The command line: `patchforge …`."""

from __future__ import annotations

import asyncio
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.console import Console

from patchforge.service.cli.animate import animate
from patchforge.service.cli.batch import batch
from patchforge.service.cli.bench import bench_app
from patchforge.service.cli.compare import compare
from patchforge.service.cli.doctor import doctor
from patchforge.service.cli.errors import StartReport, check_temporary_folder, needs, show_error, typed_errors
from patchforge.service.cli.evaluate import evaluate, grid
from patchforge.service.cli.generate import generate
from patchforge.service.cli.report import print_table, write_json
from patchforge.service.cli.sample import sample
from patchforge.service.cli.soak import soak
from patchforge.service.cli.streams import open_missing_streams
from patchforge.service.cli.train import data_app, train_app

if TYPE_CHECKING:
    from patchforge.service.settings import Settings

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
app.command("animate")(needs("worker")(animate))
app.command("batch")(batch)
app.command("compare")(needs("worker")(compare))
app.command("doctor")(needs("worker")(doctor))
app.command("eval")(needs("worker")(evaluate))
app.command("grid")(needs("worker")(grid))
app.command("sample")(sample)
app.command("soak")(needs("all")(soak))
errors = Console(stderr=True, highlight=False)


@app.callback()
def main() -> None:
    open_missing_streams()


@app.command()
@needs("all")
def serve() -> None:
    """Run everything on this machine: gateway, worker and, unless REDIS_URL is set, an embedded queue server."""
    from patchforge.service.logs import configure_logs
    from patchforge.service.supervisor import serve as run
    from patchforge.service.tracing import traced

    if find_spec("torch") is None:  # the worker would find out too, but seconds later
        raise ModuleNotFoundError(name="torch")
    settings = _read_settings()
    configure_logs(settings, "gateway")
    with typed_errors(), traced("gateway"):
        check_temporary_folder()
        asyncio.run(run(settings))


@app.command()
@needs("server")
def gateway() -> None:
    """Run only the HTTP and gRPC gateway; REDIS_URL names the queue server."""
    from patchforge.service.gateway.app import serve_gateway
    from patchforge.service.logs import configure_logs
    from patchforge.service.tracing import traced

    settings = _read_settings()
    _require_queue_server(settings)
    configure_logs(settings, "gateway")
    with typed_errors(), traced("gateway"):
        check_temporary_folder()
        asyncio.run(serve_gateway(settings))


@app.command()
def worker(
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    report_to: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run only a worker; REDIS_URL names the queue server. Start one worker per device."""
    report = StartReport(report_to)
    with needs("worker", report), typed_errors(report), report.telling_of_bugs():
        check_temporary_folder()
        from patchforge.service.logs import configure_logs
        from patchforge.service.tracing import traced
        from patchforge.service.worker.main import serve_worker

        settings = _read_settings()
        _require_queue_server(settings)
        configure_logs(settings, "worker")
        with traced("worker"):
            asyncio.run(serve_worker(settings, parent, report.started))


@app.command("hash-key")
@needs("server")
def hash_key(
    name: Annotated[str, typer.Argument(help="Name of the caller; only this name sees its jobs.")],
) -> None:
    """Make an API key: print the secret for the caller and the entry for PATCHFORGE_API_KEYS."""
    from patchforge.service.gateway.auth import make_entry, new_key
    from patchforge.service.settings import KEY_NAME

    if not re.fullmatch(KEY_NAME, name):
        raise typer.BadParameter("use at most 64 letters, digits, `.`, `_` and `-`", param_hint="NAME")
    key = new_key()
    print(f"key    {key}")
    print(f"entry  {make_entry(name, key)}")
    errors.print(
        "Keep the key: it is not shown again. Add the entry to PATCHFORGE_API_KEYS (comma-separated) and restart.",
        soft_wrap=True,
    )


@app.command("results-rule")
@needs("server")
def results_rule(
    window: Annotated[
        int, typer.Option(min=1, max=999, help="Hours of the longest completion_window of batches.")
    ] = 24,
    out: Annotated[Path | None, typer.Option(help="Write the rule into this file instead.")] = None,
) -> None:
    """Print the lifecycle rule that the bucket of PATCHFORGE_RESULTS needs, as JSON for `aws s3api`."""
    from patchforge.service.results.lifetime import expiry_rule

    settings = _read_settings()
    with typed_errors():
        rule = expiry_rule(settings, window)
        if out is not None:
            write_json(out, rule)
    if out is None:
        print(json.dumps(rule, indent=1))


@app.command()
@needs("worker")
def verify(
    file: Annotated[Path, typer.Argument(help="Golden .safetensors file with weights, inputs, outputs and config.")],
    tolerance: Annotated[
        float, typer.Option(help="Largest difference allowed, as a share of the key's largest golden value.")
    ] = 2e-5,
) -> None:
    """Check networks and samplers against golden vectors; exit status 1 if any differs."""
    from patchforge.model.verify import verify as compare

    rows, worst = [], 0.0
    with typed_errors():
        for difference in compare(file):
            worst = max(worst, difference.worst)
            packed = "" if difference.packed is None else f"{difference.packed:.1e}"
            ok = "yes" if difference.worst <= tolerance else "NO"
            rows.append((difference.key, f"{difference.alone:.1e}", packed, ok))
    print_table(str(file), ("key", "alone", "packed", "ok"), rows, width=100)
    print(f"largest relative difference {worst:.2e}, tolerance {tolerance:.0e}")
    if not worst <= tolerance:
        raise typer.Exit(1)


@app.command("import-checkpoint")
@needs("worker")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="The .ckpt file; pickled code in it never runs.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder of a diffusers autoencoder with safetensors weights.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    text_encoder: Annotated[
        Path | None, typer.Option(help="Folder of the text encoder of a text-to-image checkpoint, with safetensors.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a padded text; default: as the paper's code pads.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Pixels along each side, for text-to-image checkpoints.")] = 256,
    name: Annotated[str | None, typer.Option(help="Name of the model; default: that of the output folder.")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="File with one class a line, or `imagenet`; default: numbers.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Default: that of the paper's checkpoints, or unknown for text-to-image.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, if the checkpoint lacks it.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Type of the stored weights.")
    ] = "float32",
) -> None:
    """Convert a checkpoint in the paper's format to a bundle that can be served."""
    import torch

    from patchforge.model.storage.import_checkpoint import import_checkpoint as run

    with typed_errors():
        manifest = run(
            checkpoint,
            autoencoder,
            out,
            dtype=getattr(torch, dtype),
            progress=errors.print,
            name=name,
            class_names=class_names,
            licence=licence,
            num_heads=num_heads,
            text_encoder=text_encoder,
            max_tokens=max_tokens,
            size=size,
        )
        print(f"{out}: {manifest.name}, {manifest.network.kind}-conditional")


def _read_settings() -> Settings:
    """Read the settings from the environment; show a bad value as one line and exit with status 2."""
    from pydantic_settings import SettingsError

    from patchforge.service.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        show_error(f"invalid setting: {'; '.join(map(_explain_setting, error.errors()))}")
        raise typer.Exit(2) from error
    except SettingsError as error:
        show_error(f"invalid PATCHFORGE_… setting: {error}")
        raise typer.Exit(2) from error


def _explain_setting(error: Any) -> str:
    """One bad value, which is not repeated: it may be a misplaced key."""
    name, *rest = error["loc"]
    name = name if name.isupper() else f"PATCHFORGE_{name.upper()}"
    place = "".join(f"[{part}]" for part in rest)
    return f"{name}{place}: {error['msg'].removeprefix('Value error, ')}"


def _require_queue_server(settings: Settings) -> None:
    if not settings.queue_urls:
        errors.print("error: REDIS_URL is not set; `patchforge serve` needs none and starts its own queue server")
        raise typer.Exit(2)


if __name__ == "__main__":
    app()

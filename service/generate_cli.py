"""`patchforge generate`: pictures without a server, or from one."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress

from service.cli_errors import typed_errors
from service.errors import InvalidRequest
from service.files import picture_path
from service.progress import OnPreview, generation_progress
from service.terminal import Protocol, escape_sequence, half_blocks, protocol

BUNDLE = Path("model/bundles/emoji-text")
INTERRUPTED = 130


def generate(
    prompt: Annotated[list[str], typer.Argument(help="Prompts, or class names for a class-conditional model.")],
    bundle: Annotated[
        Path | None, typer.Option(help=f"Folder of a model bundle, to draw without a server.  [default: {BUNDLE}]")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a server to draw instead; its API key is taken from PATCHFORGE_API_KEY.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --server: one of its models.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("pictures"),
    sampler: Annotated[str | None, typer.Option(help="A sampler's name; default: the model's.")] = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    show: Annotated[bool, typer.Option(help="Show the pictures where the output is a terminal.")] = True,
) -> None:
    """Make pictures; one PNG a prompt."""
    options = {"sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed}
    how = protocol(os.environ, is_terminal=show and sys.stdout.isatty())
    with typed_errors():
        if server is None:
            if model is not None:
                raise InvalidRequest("--model goes with --server; a bundle is one model")
            _offline(bundle or BUNDLE, prompt, out, options, how)
        elif bundle is not None:
            raise InvalidRequest("--bundle draws without a server: leave it or --server out")
        else:
            _online(server, model, prompt, out, options, how)


def _offline(bundle: Path, prompts: list[str], out: Path, options: dict[str, Any], how: Protocol) -> None:
    from service.offline import generate_files

    for path, savings in generate_files(bundle, prompts, out, **options):
        _tell(path, savings, path.read_bytes(), how)


def _online(
    server: str, model: str | None, prompts: list[str], out: Path, options: dict[str, Any], how: Protocol
) -> None:
    from service.online import generate_online

    key = os.environ.get("PATCHFORGE_API_KEY") or None
    try:
        with _screen(how) as (progress, on_preview):
            made = asyncio.run(generate_online(server, key, prompts, progress, model, on_preview, **options))
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    out.mkdir(parents=True, exist_ok=True)
    for number, (words, result) in enumerate(zip(prompts, made, strict=True)):
        [picture] = result.pictures
        path = picture_path(out, number, words, picture.seed)
        picture.save(path)
        _tell(path, result.report.savings_ratio, picture.data, how)


@contextmanager
def _screen(how: Protocol) -> Iterator[tuple[Progress, OnPreview | None]]:
    """Progress lines and, on a terminal in colour, the latest preview above them; nothing of it stays."""
    progress = generation_progress()
    if how is Protocol.NONE or not progress.console.is_terminal:
        with progress:
            yield progress, None
        return
    with Live(progress, console=progress.console, transient=True) as live:
        yield progress, lambda data: live.update(Group(half_blocks(data), progress))


def _tell(path: Path, savings: float, data: bytes, how: Protocol) -> None:
    print(f"{path}  saved {savings:.0%} of the dense run's patch evaluations")
    if how is Protocol.BLOCKS:
        Console().print(half_blocks(data))
    elif how is not Protocol.NONE:
        print(escape_sequence(data, how), end="", flush=True)

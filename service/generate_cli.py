"""`patchforge generate`: pictures without a server, or from one."""

from __future__ import annotations

import asyncio
import os
import re
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
FILE: Any = {"exists": True, "dir_okay": False}


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
    steps: Annotated[int | None, typer.Option(help="Network evaluations, at most; default: the model's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; 1 is without. Default: the model's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed and settings draw the same picture.")] = 0,
    quality: Annotated[
        str | None, typer.Option(help="With --server: draft, standard or high, instead of --sampler and --steps.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="With --server: WIDTHxHEIGHT to resample the picture to.")] = None,
    image: Annotated[Path | None, typer.Option(help="With --server: a picture to start from.", **FILE)] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="With --image: a picture of its size, transparent where --image may change.", **FILE),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --image: how far it may change, from 0.01 to 1, which is all.")
    ] = None,
    show: Annotated[bool, typer.Option(help="Show the pictures where the output is a terminal.")] = True,
) -> None:
    """Make pictures, one PNG a prompt: without a server or, with --server, at one."""
    options: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed}
    served = {"model": model, "quality": quality, "size": size, "image": image, "mask": mask, "strength": strength}
    how = protocol(os.environ, is_terminal=show and sys.stdout.isatty())
    with typed_errors():
        if server is None:
            for name, value in served.items():
                if value is not None:
                    raise InvalidRequest(f"--{name} goes with --server")
            _offline(_found(bundle), prompt, out, options, how)
        elif bundle is not None:
            raise InvalidRequest("--bundle draws without a server: leave it or --server out")
        elif not server.startswith(("http://", "https://")):
            raise InvalidRequest("--server takes a URL that begins with http:// or https://")
        else:
            _online(server, model, prompt, out, options | _fields(served), how)


def _found(bundle: Path | None) -> Path:
    """The bundle asked for, or the one that comes with the repository."""
    if bundle is None and not BUNDLE.exists():
        raise InvalidRequest(f"there is no {BUNDLE} here: go to the repository, or give --bundle or --server")
    return bundle or BUNDLE


def _fields(served: dict[str, Any]) -> dict[str, Any]:
    """What only a server can do, as fields of a request."""
    fields = {name: served[name] for name in ("quality", "strength")}
    if served["size"] is not None:
        sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", served["size"])
        if sides is None:
            raise InvalidRequest("--size is WIDTHxHEIGHT, such as 256x256")
        fields |= {"width": int(sides[1]), "height": int(sides[2])}
    return fields | {name: served[name].read_bytes() for name in ("image", "mask") if served[name] is not None}


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

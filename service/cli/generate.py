"""`patchforge generate`: draws pictures here or on a server, writes them to files and shows them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress

from patchforge.service.cli import options
from patchforge.service.cli.album import Album, Wanted, read_prompts
from patchforge.service.cli.drawing import Drawn, OnPreview, new_progress
from patchforge.service.cli.errors import needs, typed_errors
from patchforge.service.cli.terminal import Protocol, escape_sequence, half_blocks, protocol
from patchforge.service.errors import InvalidRequest

BUNDLE = Path("emoji-text")
INTERRUPTED = 130
MAX_COUNT = 10_000
Keep = Callable[[Drawn], None]
"""Takes a finished picture."""
FILE: Any = {"exists": True, "dir_okay": False}


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts, or class names for a class-conditional model.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt a line, after those given here.", **FILE)
    ] = None,
    count: Annotated[
        int, typer.Option("-n", "--count", min=1, max=MAX_COUNT, help="Pictures of each prompt, or of each --seed.")
    ] = 1,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Random seed; may be given several times. Default: new ones every time."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help=f"Without --server: folder of a bundle, or name of a shipped bundle.  [default: {BUNDLE}]"),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Draw on the server at this URL; PATCHFORGE_API_KEY holds its API key.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --server: name of a model there.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures. None is ever overwritten.")] = Path("pictures"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Draw only what --out does not have yet of these prompts and options.")
    ] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write a sheet of all pictures too: a row for each prompt. Needs Pillow.")
    ] = False,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Patch evaluations that each picture takes at most; default: any number.")
    ] = None,
    finish_within: Annotated[
        float | None,
        typer.Option(min=0.001, help="With --server: finish each picture in so many seconds, as well as that allows."),
    ] = None,
    model_digest: Annotated[
        str | None, typer.Option(help="With --server: draw with exactly this bundle, a digest in GET /v1/models.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative-prompt", help="Text models: what the pictures should not show.")
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="With --server: draft, standard or high, instead of --sampler and --steps.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT: any with --server, else one that the model was trained at.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="With --server: contain (white bars), cover (crops) or stretch, for a --size of another shape."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="With --server: start from this picture.", **FILE)] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="With --image: picture of the same size, transparent where --image may change.", **FILE),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --image: how much it may change, from 0.01 to 1 (everything).")
    ] = None,
    metadata: Annotated[bool, typer.Option(help="Write into each picture's file how it was made.")] = True,
    show: Annotated[
        bool, typer.Option(help="Show the pictures if the output is a terminal and Pillow is installed.")
    ] = True,
) -> None:
    """Draw PNGs, here or, with --server, on a server."""
    fields: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance": guidance, "budget": budget}
    fields["negative_prompt"] = negative
    served = {"model": model, "quality": quality, "size": size, "image": image, "mask": mask, "strength": strength}
    served |= {"fit": fit, "finish-within": finish_within, "model-digest": model_digest}
    how = protocol(os.environ, is_terminal=show and sys.stdout.isatty() and find_spec("PIL") is not None)
    with typed_errors(), needs("worker"):
        if grid and find_spec("PIL") is None:  # rather said before anything is drawn
            raise ModuleNotFoundError(name="PIL")
        _check_where(server, bundle, served)
        words = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        if not words:
            raise InvalidRequest("give a prompt, or --prompts with a file of them")
        album = Album(out, fields | served | {"bundle": bundle, "server": server})
        seeds, there = seed or [], dict[Wanted, Path]()
        if resume:
            wanted, there = album.resume(words, seeds, count)
        else:
            wanted = album.choose(words, seeds, count)
        missing = [each for each in wanted if each not in there]

        def draw(keep: Keep) -> None:
            if server is None:
                drawn = {"metadata": metadata, "size": None if size is None else options.read_size(size)}
                _draw_offline(bundle or BUNDLE, missing, keep, fields | drawn, how)
            else:
                request = fields | _request_fields(served) | {"metadata": None if metadata else False}
                _draw_online(server, model, missing, keep, request, how)

        made = there | (_keep_all(album, missing, draw, how) if missing else {})
        for path in there.values():
            print(f"{path}  is there already")
        if grid:
            sheet = album.add_grid({each: made[each] for each in wanted})
            print(f"{sheet}  shows {len(made)} pictures")


def _keep_all(album: Album, wanted: list[Wanted], draw: Callable[[Keep], None], how: Protocol) -> dict[Wanted, Path]:
    """Save what is drawn as soon as it is, and report it at the end, whatever the end is."""
    made: dict[Wanted, Path] = {}
    kept: dict[Wanted, Drawn] = {}

    def keep(drawn: Drawn) -> None:
        made[drawn.wanted] = album.add(drawn.wanted, drawn.picture.data)
        kept[drawn.wanted] = drawn

    try:
        draw(keep)
    except KeyboardInterrupt:
        print(
            f"cancelled{f'; --resume draws what is missing beside {len(made)} pictures' if made else ''}",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for each in wanted:
            if each in kept:
                _report(made[each], kept[each], how)
    return made


def _check_where(server: str | None, bundle: Path | None, served: dict[str, Any]) -> None:
    if server is None:
        for name, value in served.items():
            if value is not None and name != "size":
                raise InvalidRequest(f"--{name} requires --server")
    elif bundle is not None:
        raise InvalidRequest("--bundle and --server cannot be used together")
    elif not server.startswith(("http://", "https://")):
        raise InvalidRequest("--server must be a URL that begins with http:// or https://")


def _request_fields(served: dict[str, Any]) -> dict[str, Any]:
    """The options that only a server supports, as fields of a request."""
    fields = {name: served[name] for name in ("quality", "strength", "fit")}
    if served["size"] is not None:
        fields["width"], fields["height"] = options.read_size(served["size"])
    fields |= {"finish_within_seconds": served["finish-within"], "model_digest": served["model-digest"]}
    return fields | {name: served[name].read_bytes() for name in ("image", "mask") if served[name] is not None}


def _draw_offline(bundle: Path, wanted: list[Wanted], keep: Keep, fields: dict[str, Any], how: Protocol) -> None:
    from patchforge.service.cli.offline import draw_offline

    with _show_progress(how) as (progress, _):
        draw_offline(bundle, wanted, progress, keep, **fields)


def _draw_online(
    server: str, model: str | None, wanted: list[Wanted], keep: Keep, fields: dict[str, Any], how: Protocol
) -> None:
    from patchforge.service.cli.online import draw_online

    key = os.environ.get("PATCHFORGE_API_KEY") or None
    with _show_progress(how) as (progress, on_preview):
        asyncio.run(draw_online(server, key, wanted, progress, keep, model, on_preview, **fields))


@contextmanager
def _show_progress(how: Protocol) -> Iterator[tuple[Progress, OnPreview | None]]:
    """Progress lines and, on a colour terminal, the latest preview above them; both disappear at the end."""
    progress = new_progress()
    if how is Protocol.NONE or not progress.console.is_terminal:
        with progress:
            yield progress, None
        return
    with Live(progress, console=progress.console, transient=True) as live:
        yield progress, lambda data: live.update(Group(half_blocks(data), progress))


def _report(path: Path, drawn: Drawn, how: Protocol) -> None:
    """Say what was written, and show it."""
    print(f"{path}  saved {drawn.savings:.0%} of the dense run's patch evaluations")
    if drawn.truncated:
        print(f"{path}  the prompt is longer than the model reads: its end was ignored", file=sys.stderr)
    if how is Protocol.BLOCKS:
        Console().print(half_blocks(drawn.picture.data))
    elif how is not Protocol.NONE:
        print(escape_sequence(drawn.picture.data, how), end="", flush=True)

"""`patchforge sample`: many pictures for an evaluation, by index: here on every device, or on a server."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from patchforge.service.cli import options
from patchforge.service.cli.album import read_prompts
from patchforge.service.cli.errors import needs, show_error, typed_errors
from patchforge.service.cli.samples import SampleFolder, Subjects
from patchforge.service.errors import InvalidRequest

PORTION = 16
"""Pictures drawn together on one device."""
POLL_SECONDS = 0.5
INTERRUPTED = 130

Advance = Callable[[int], None]
"""Takes the number of samples that are there."""


@dataclass(frozen=True)
class Order:
    """What the samples are: everything that their pixels depend on, but for the model's weights."""

    model: str
    seed: int
    sampler: str | None
    steps: int | None
    guidance: float | None
    budget: int | None

    @property
    def drawing(self) -> dict[str, Any]:
        """The fields of a request, and the arguments of `Pipeline.generate`."""
        return {name: value for name, value in asdict(self).items() if name not in ("model", "seed")}


def sample(
    model: Annotated[
        str, typer.Option(help="Folder of a bundle, or name of a shipped bundle; with --server: name of a model there.")
    ],
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Samples.")],
    out: Annotated[Path, typer.Option(help="Folder for the samples; a run that was stopped goes on there.")],
    npz: Annotated[
        Path | None, typer.Option(help="Write all samples into this file too, as the ADM evaluation suite takes them.")
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Classes take turns; otherwise one is drawn for each sample.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt a line, which take turns.", exists=True, dir_okay=False),
    ] = None,
    seed: options.Seed = 0,
    sampler: options.Sampler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Patch evaluations that each sample takes at most.")] = None,
    server: Annotated[
        str | None, typer.Option(help="Draw on the server at this URL; PATCHFORGE_API_KEY holds its API key.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1000, help="With --server: jobs in its queue at a time.")] = 64,
    device: Annotated[
        list[str] | None, typer.Option(help="Without --server: a device to use; repeatable. Default: all accelerators.")
    ] = None,
) -> None:
    """Draw many samples: number i has the seed --seed + i, and the same words wherever it is drawn."""
    order = Order(model, seed, sampler, steps, guidance, budget)
    folder = SampleFolder(out, count)
    with typed_errors(), needs("worker"):
        if npz is not None and npz.suffix != ".npz":
            raise InvalidRequest("--npz must end in .npz")
        words = read_prompts(prompts) if prompts else None
        if words and balanced:
            raise InvalidRequest("--balanced is for classes: prompts take turns anyway")
        try:
            if server is None:
                _sample_here(folder, order, words, balanced, device or [])
            else:
                from patchforge.service.cli.sample_online import sample_online

                key = os.environ.get("PATCHFORGE_API_KEY") or None
                with show_progress(count) as advance:
                    asyncio.run(sample_online(server, key, folder, order, words, balanced, jobs, advance))
        except KeyboardInterrupt:
            there = count - len(folder.missing())
            show_error(f"stopped with {there} of {count} samples; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        print(f"{out}  has {count} samples")
        if npz is not None:
            folder.pack(npz)
            print(f"{npz}  holds them as arr_0")


def choose_subjects(name: str, classes: list[str], words: list[str] | None, balanced: bool, seed: int) -> Subjects:
    """Return the words of all samples: prompts for a text model, classes for another.

    Raises:
        InvalidRequest: the model takes the other kind.
    """
    if classes and words:
        raise InvalidRequest(f"--prompts: {name} is a class model")
    if not classes and not words:
        raise InvalidRequest(f"{name} is a text-to-image model: give --prompts")
    return Subjects(classes or words or [], None if words or balanced else seed)


def describe(order: Order, subjects: Subjects, weights: str | None, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what two runs must have in common to be one. `defaults` are the model's."""
    listed = sha256("\n".join(subjects.words).encode()).hexdigest()
    drawn_from = {"seed": order.seed, "words_sha256": listed, "in_turn": subjects.at_random is None}
    return {"weights_sha256": weights, "defaults": defaults, **drawn_from, **order.drawing}


@contextmanager
def show_progress(count: int, what: str = "samples") -> Iterator[Advance]:
    """Show on a terminal how many of them are there, and how long the others will take."""
    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task(what, total=count)
        yield lambda there: progress.update(line, completed=there)


def _sample_here(folder: SampleFolder, order: Order, words: list[str] | None, balanced: bool, named: list[str]) -> None:
    from patchforge.model.storage.bundle import open_bundle

    bundle = open_bundle(order.model)
    manifest = bundle.manifest
    subjects = choose_subjects(manifest.name, list(manifest.class_names), words, balanced, order.seed)
    folder.begin(describe(order, subjects, bundle.weights_sha256, manifest.defaults.model_dump()))
    if not folder.missing():
        return
    devices = named or _accelerators()
    with show_progress(folder.count) as advance:
        if len(devices) < 2:
            _draw_share(folder, order, subjects, devices[0] if devices else None, 0, 1, advance)
            return
        start = multiprocessing.get_context("spawn").Process
        shares = [
            start(target=_draw_in_process, args=(folder, order, subjects, each, number, len(devices), os.getpid()))
            for number, each in enumerate(devices)
        ]
        for process in shares:
            process.start()
        try:
            while any(process.is_alive() for process in shares):
                advance(folder.count - len(folder.missing()))
                time.sleep(POLL_SECONDS)
        finally:
            for process in shares:
                process.terminate()
                process.join()
    if failed := [name for name, process in zip(devices, shares, strict=True) if process.exitcode]:
        raise InvalidRequest(f"the process of {', '.join(failed)} failed; the same command goes on")


def _accelerators() -> list[str]:
    """Return the names of all accelerators, unless `PATCHFORGE_DEVICE` names a device."""
    import torch

    if (os.environ.get("PATCHFORGE_DEVICE") or "auto") != "auto" or not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    return [f"{kind.type}:{number}" for number in range(torch.accelerator.device_count())] if kind else []


def _draw_in_process(
    folder: SampleFolder, order: Order, subjects: Subjects, device: str, share: int, shares: int, parent: int
) -> None:
    def stop_with_parent(_: int) -> None:
        if os.getppid() != parent:
            raise SystemExit(1)

    with typed_errors():
        _draw_share(folder, order, subjects, device, share, shares, stop_with_parent)


def _draw_share(
    folder: SampleFolder,
    order: Order,
    subjects: Subjects,
    device: str | None,
    share: int,
    shares: int,
    advance: Advance,
) -> None:
    """Draw the missing samples of a share, some at a time, on one device."""
    from patchforge.model.device import best_device, named_device, prepare_cpu
    from patchforge.model.pipeline import Pipeline

    prepare_cpu(None, only_pictures=True)
    pipeline = Pipeline.open(order.model, named_device(device) if device else best_device())
    missing = folder.missing(share, shares)
    there = folder.count - len(missing)
    for start in range(0, len(missing), PORTION):
        portion = missing[start : start + PORTION]
        seeds = [order.seed + index for index in portion]
        made = pipeline.generate([subjects.of(index) for index in portion], seed=seeds, **order.drawing)
        for index, picture in zip(portion, made.pictures, strict=True):
            folder.add(index, picture.encode("PNG"))
        advance(there + start + len(portion))

"""``patchforge data | train``: the commands that make models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.cli_errors import typed_errors

data_app = typer.Typer(help="Get training pictures into one table.", no_args_is_help=True)
train_app = typer.Typer(help="Train an autoencoder, then models in its latents.", no_args_is_help=True)

TableOption = Annotated[Path, typer.Option("--data", help="A picture table made by `patchforge data`.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; default: every core.")]


@data_app.command("emoji")
def data_emoji(
    out: Annotated[Path, typer.Option()] = Path("data/emoji-64.npz"),
    downloads: Annotated[Path, typer.Option(help="Where the npm packages are kept.")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 64,
) -> None:
    """Emoji with their names in three styles, about 11,000 pictures, from npm packages (needs npm, once)."""
    from model.training.data import emoji_pictures, fetch_emoji

    with typed_errors():
        fetch_emoji(downloads)
        pictures = emoji_pictures(downloads, size)
        pictures.save(out)
    print(f"{out}: {len(pictures)} pictures, {len(pictures.class_names)} classes")


@data_app.command("folder")
def data_folder(
    folder: Annotated[Path, typer.Argument(help="Pictures with caption files beside them, or in class subfolders.")],
    out: Annotated[Path, typer.Option()],
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 64,
) -> None:
    """Your own pictures; ``cat.png`` takes its captions from ``cat.txt``, else from its name."""
    from model.training.data import folder_pictures

    with typed_errors():
        pictures = folder_pictures(folder, size)
        pictures.save(out)
    print(f"{out}: {len(pictures)} pictures, {len(pictures.class_names)} classes")


@train_app.command("autoencoder")
def train_autoencoder_command(
    out: Annotated[Path, typer.Option()] = Path("runs/autoencoder"),
    data: TableOption = Path("data/emoji-64.npz"),
    steps: int = 5000,
    minutes: Annotated[float | None, typer.Option(help="Stop after this long, if sooner.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Train the autoencoder that latents come from."""
    from model.device import prepare_cpu
    from model.training.autoencoder import AutoencoderRecipe, train_autoencoder
    from model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        psnr = train_autoencoder(Pictures.load(data), out, AutoencoderRecipe(steps=steps), minutes)
    print(f"{out}: {psnr:.2f} dB PSNR on held-out pictures")


@train_app.command("model")
def train_model_command(
    kind: Annotated[Literal["text", "class"], typer.Argument(help="What the model is conditioned on.")],
    out: Annotated[Path, typer.Option(help="Folder for state, log, samples and bundle; its name names the model.")],
    data: TableOption = Path("data/emoji-64.npz"),
    autoencoder: Annotated[Path, typer.Option()] = Path("runs/autoencoder"),
    steps: Annotated[int, typer.Option(help="In all; a run that was stopped resumes where it was.")] = 8000,
    minutes: Annotated[float | None, typer.Option(help="Training time in all, if that is over sooner.")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="A bundle to go on from: its weights, sizes and autoencoder.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Scales both learning rates; below 1 to go on gently.")] = 1.0,
    timesteps: Annotated[
        Literal["mixed", "ltg", "sit", "uniform", "mean"],
        typer.Option(help="How training draws each patch's timestep; `mixed` is that of the shipped models."),
    ] = "mixed",
    batch: int = 64,
    width: int = 192,
    depth: int = 6,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks; needs a C++ compiler.")
    ] = False,
    licence: Annotated[str, typer.Option(help="Licence of the weights, for the bundle.")] = "unspecified",
    threads: ThreadsOption = None,
) -> None:
    """Train a text-to-image or class-conditional model; resumes, and writes a bundle with every sample grid."""
    from model.bundle import open_bundle
    from model.device import prepare_cpu
    from model.training.data import Pictures
    from model.training.loop import Recipe
    from model.training.run import Size, train_model
    from model.training.timesteps import SCHEDULES

    prepare_cpu(threads)
    recipe = Recipe(steps=steps, minutes=minutes, batch=batch, compile=compile_blocks, timesteps=SCHEDULES[timesteps])
    recipe = replace(recipe, muon_rate=rate * (recipe.muon_rate or 0.0), adam_rate=rate * recipe.adam_rate)
    size = Size(width, depth)
    with typed_errors():
        begun = open_bundle(start) if start else None
        bundle = train_model(kind, Pictures.load(data), autoencoder, out, recipe, size, licence, begun)
    print(f"{bundle}: serve it with PATCHFORGE_BUNDLE_DIR={bundle.parent}")


@train_app.command("judge")
def train_judge_command(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: TableOption = Path("data/emoji-64.npz"),
    steps: int = 2800,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "unspecified",
    threads: ThreadsOption = None,
) -> None:
    """Train the classifier that `patchforge eval` measures in, for pictures other than the emoji."""
    from model.device import prepare_cpu
    from model.evaluation.judge_training import JudgeRecipe, train_judge
    from model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        judge = train_judge(Pictures.load(data), out, JudgeRecipe(steps=steps), licence)
    print(f"{out}: {json.dumps(judge.record['accuracy'], indent=1)}")

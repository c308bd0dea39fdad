"""`patchforge data` and `patchforge train`: collect pictures and train models."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import needs, typed_errors
from patchforge.service.cli.generate import BUNDLE

data_app = typer.Typer(help="Collect training pictures in one table.", no_args_is_help=True)
train_app = typer.Typer(help="Train an autoencoder, then models in its latents.", no_args_is_help=True)

FEW = 1000
"""Fewer pictures than these show a new network too little."""

TableOut = Annotated[Path, typer.Option("--out", help="Picture table to write.")]

TimestepsName = Literal["mixed", "noisy", "noisiest", "wide", "ltg", "sit", "uniform", "mean"]


@data_app.command("emoji")
@needs("worker")
def data_emoji(
    out: TableOut = options.TABLE,
    downloads: Annotated[Path, typer.Option(help="Folder for the npm packages.")] = Path("data/emoji"),
    size: options.PictureSize = 256,
) -> None:
    """Collect about 9,500 emoji in seven styles, with their names, from npm packages; the first run needs npm."""
    from patchforge.model.training.data import FINEST_PATCH, check_side
    from patchforge.model.training.emoji import emoji_pictures, fetch_emoji

    with typed_errors():
        check_side(size, FINEST_PATCH, "--size")
        fetch_emoji(downloads)
        pictures = emoji_pictures(downloads, size)
        pictures.save(out)
    print(f"{out}: {len(pictures)} pictures, {len(pictures.class_names)} classes")


@data_app.command("folder")
@needs("worker")
def data_folder(
    folder: Annotated[
        Path, typer.Argument(help="Pictures with caption files beside them, or in one subfolder per class.")
    ],
    out: TableOut,
    size: options.PictureSize = 64,
) -> None:
    """Collect your own pictures; the captions of cat.png come from cat.txt, or else from the file name."""
    from patchforge.model.training.data import FINEST_PATCH, check_side, folder_pictures

    with typed_errors():
        check_side(size, FINEST_PATCH, "--size")
        pictures = folder_pictures(folder, size)
        pictures.save(out)
    print(f"{out}: {len(pictures)} pictures, {len(pictures.class_names)} classes")


@train_app.command("autoencoder")
@needs("worker")
def train_autoencoder_command(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/autoencoder"),
    data: options.Table = options.TABLE,
    steps: options.TrainingSteps = 8000,
    minutes: options.Minutes = None,
    channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 6,
    perceptual: Annotated[
        float, typer.Option(help="Weight of the EfficientNet features in the loss; 0 needs no such weights.")
    ] = 0.2,
    decoder_of: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained autoencoder: keep its encoder, and train its decoder further."),
    ] = None,
    threads: options.Threads = None,
) -> None:
    """Train the autoencoder whose latents the models use; resume if stopped."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.training.autoencoder import AutoencoderRecipe, train_autoencoder
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    recipe = AutoencoderRecipe(steps=steps, latent_channels=channels, perceptual=perceptual)
    with typed_errors():
        psnr = train_autoencoder(Pictures.load(data), out, recipe, minutes, decoder_of)
    print(f"{out}: {psnr:.2f} dB PSNR on held-out pictures")


@train_app.command("preview")
@needs("worker")
def train_preview_command(
    autoencoder: Annotated[Path, typer.Option(help="Folder of a trained autoencoder.")] = Path("runs/autoencoder"),
    data: options.Table = options.TABLE,
    steps: options.TrainingSteps = 2000,
    threads: options.Threads = None,
) -> None:
    """Train the preview decoder of an autoencoder, and write it into the autoencoder's folder."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.training.data import Pictures
    from patchforge.model.training.preview import PreviewRecipe, train_preview

    prepare_cpu(threads)
    cache = autoencoder.absolute().parent / "cache"
    with typed_errors():
        psnr = train_preview(Pictures.load(data), autoencoder, PreviewRecipe(steps=steps), cache)
    print(f"{autoencoder}: previews {psnr:.2f} dB PSNR on held-out pictures")


@train_app.command("model")
@needs("worker")
def train_model_command(
    kind: Annotated[Literal["text", "class"], typer.Argument(help="Condition of the model: a prompt or a class.")],
    out: Annotated[Path, typer.Option(help="Folder for state, log, samples and bundle; its name names the model.")],
    data: options.Table = options.TABLE,
    autoencoder: Annotated[Path, typer.Option(help="Folder of a trained autoencoder.")] = Path("runs/autoencoder"),
    steps: Annotated[int, typer.Option(help="Training steps in total; a stopped run resumes where it stopped.")] = 8000,
    minutes: options.Minutes = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Bundle to continue from: its weights, sizes and autoencoder.")
    ] = None,
    trunk: Annotated[
        Path | None, typer.Option(help="Bundle or weights file of another network: begin with the weights that fit.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Factor for both learning rates; below 1 for fine-tuning.")] = 1.0,
    timesteps: Annotated[
        TimestepsName,
        typer.Option(
            help="How training draws the timestep of each patch; `noisiest` learns captions fastest, `wide` ends a run."
        ),
    ] = "mixed",
    batch: options.Batch = 64,
    width: options.Width = 192,
    depth: options.Depth = 6,
    average: Annotated[float, typer.Option(help="Decay of the moving average of the weights.")] = 0.999,
    constant: Annotated[bool, typer.Option("--constant", help="Never lower the learning rates.")] = False,
    decay_from: Annotated[
        Path | None,
        typer.Option(help="Folder of a --constant run: copy its state, and lower the rates from there to the end."),
    ] = None,
    decay_minutes: Annotated[float, typer.Option(help="Training time of that end, in minutes.")] = 30,
    often: Annotated[
        list[str] | None, typer.Option(help="Style whose pictures are drawn four times as often; repeatable.")
    ] = None,
    small: Annotated[int | None, typer.Option(help="Train at this smaller size too, in pixels.")] = None,
    small_first: Annotated[int, typer.Option(help="Number of first steps at the smaller size only.")] = 0,
    small_share: Annotated[float, typer.Option(help="Share of the smaller size in all later steps.")] = 0.15,
    small_batch: Annotated[int, typer.Option(help="Pictures per training step of the smaller size.")] = 16,
    sample_every: Annotated[int, typer.Option(help="Training steps between sample grids.")] = 1000,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks; needs a C++ compiler.")
    ] = False,
    licence: options.Licence = "unspecified",
    threads: options.Threads = None,
) -> None:
    """Train a text-to-image or class-conditional model; resume if stopped; write a bundle with every sample grid."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.storage.bundle import open_bundle
    from patchforge.model.training.data import Pictures
    from patchforge.model.training.loop import Recipe, Small
    from patchforge.model.training.run import Size, train_model
    from patchforge.model.training.snapshot import falling
    from patchforge.model.training.timesteps import SCHEDULES

    prepare_cpu(threads)
    recipe = Recipe(steps=steps, minutes=minutes, batch=batch, compile=compile_blocks, timesteps=SCHEDULES[timesteps])
    recipe = replace(recipe, muon_rate=rate * (recipe.muon_rate or 0.0), adam_rate=rate * recipe.adam_rate)
    recipe = replace(recipe, average=average, sample_every=sample_every)
    if constant:
        recipe = replace(recipe, constant_share=1.0)
    if small is not None:
        recipe = replace(recipe, small=Small(small, small_batch, small_first, small_share))
    cache = None
    with typed_errors():
        if decay_from is not None:
            recipe, cache = falling(decay_from, out, recipe, decay_minutes), decay_from.absolute().parent / "cache"
        base, size = open_bundle(start) if start else None, Size(width, depth)
        pictures = Pictures.load(data).drawn_more(often or [])
        if kind == "text" and start is None and trunk is None and not out.exists():
            _advise_start(len(pictures))
        bundle = train_model(kind, pictures, autoencoder, out, recipe, size, licence, base, cache, trunk)
    print(f"{bundle}: serve it beside the shipped models with PATCHFORGE_BUNDLE_DIR={bundle.parent}{os.pathsep}shipped")


def _advise_start(pictures: int) -> None:
    """Say where to begin if there are too few pictures to learn everything from."""
    if pictures < FEW:
        print(
            f"note: {pictures} pictures are few to learn everything from. --from {BUNDLE} begins with what the shipped "
            "model knows, and with its autoencoder",
            file=sys.stderr,
        )


@train_app.command("judge")
@needs("worker")
def train_judge_command(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: options.Table = options.TABLE,
    steps: options.TrainingSteps = 2800,
    licence: options.Licence = "unspecified",
    threads: options.Threads = None,
) -> None:
    """Train the judge for pictures other than the emoji: the classifier whose features `patchforge eval` uses."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.evaluation.judge_training import JudgeRecipe, train_judge
    from patchforge.model.training.data import Pictures

    prepare_cpu(threads)
    with typed_errors():
        judge = train_judge(Pictures.load(data), out, JudgeRecipe(steps=steps), licence)
    print(f"{out}: {json.dumps(judge.record['accuracy'], indent=1)}")

"""Command-line options that several commands share, declared once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.fit import Size

TABLE = Path("data/emoji-256.npz")
LATENTS = Path("emoji-class")
"""Name of the shipped bundle whose autoencoder the training benchmarks use."""

# What goes in.
Bundle = Annotated[Path, typer.Argument(help="Folder of a bundle, or name of a shipped bundle.")]
Table = Annotated[Path, typer.Option("--data", help="Picture table made by `patchforge data`.")]
Judge = Annotated[
    Path | None,
    typer.Option(help="Judge made by `patchforge train judge`; default: the shipped judge of emoji."),
]
Latents = Annotated[Path, typer.Option(help="Bundle whose autoencoder all models share.")]
Style = Annotated[str, typer.Option(help="Use only pictures of this style; empty = all styles.")]
MaxSize = Annotated[int, typer.Option(help="Side in pixels; larger pictures are reduced to it.")]
PictureSize = Annotated[int, typer.Option(min=16, max=2048, help="Side of the pictures in pixels.")]

# How pictures are drawn.
Sampler = Annotated[str | None, typer.Option(help="Name of a sampler; default: the model's.")]
Steps = Annotated[int | None, typer.Option(help="Maximum number of network evaluations; default: the model's.")]
Guidance = Annotated[
    float | None, typer.Option(help="How closely to follow the prompt; 1 = no guidance. Default: the model's.")
]
Seed = Annotated[int, typer.Option(help="Random seed; the same seed and settings repeat the result.")]

# How models are trained.
TrainingSteps = Annotated[int, typer.Option(min=1, help="Training steps per model.")]
Minutes = Annotated[float | None, typer.Option(help="Maximum training time in minutes.")]
Batch = Annotated[int, typer.Option(help="Pictures per training step.")]
Width = Annotated[int, typer.Option(help="Width of the network.")]
Depth = Annotated[int, typer.Option(help="Number of blocks of the network.")]
Licence = Annotated[str, typer.Option(help="Licence of the weights, stored with them.")]

# Where results go.
Json = Annotated[Path | None, typer.Option("--out", help="Write the figures as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Write a plot: .png or .svg; needs matplotlib.")]
Doc = Annotated[Path | None, typer.Option(help="Write the tables into this page, between its marks.")]

Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")]


def read_size(text: str) -> Size:
    """Read WIDTHxHEIGHT.

    Raises:
        InvalidRequest: it is something else.
    """
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if sides is None:
        raise InvalidRequest("--size must be WIDTHxHEIGHT, such as 256x256")
    return int(sides[1]), int(sides[2])

"""A table of drawn shapes that a judge learns in seconds: colour, size and form, in two styles."""

from __future__ import annotations

import colorsys
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from patchforge.model.evaluation.judge_training import JudgeRecipe, train_judge
from patchforge.model.training.autoencoder import AutoencoderRecipe, train_autoencoder
from patchforge.model.training.data import Pictures
from patchforge.model.training.loop import Recipe
from patchforge.model.training.run import Size, train_model

COLOURS = (
    "red",
    "orange",
    "amber",
    "yellow",
    "lime",
    "green",
    "teal",
    "cyan",
    "azure",
    "blue",
    "indigo",
    "violet",
    "purple",
    "magenta",
    "pink",
    "crimson",
)
SIZES = {"tiny": 5, "small": 8, "large": 11, "huge": 14}
FORMS = ("cat", "dog")
"""Names of the classes of the tiny bundle: discs and squares."""
STYLES = ("3d", "flat")


def shapes() -> Pictures:
    """256 pictures of 32×32 pixels: 128 concepts, each in both styles."""
    rows = list(product(enumerate(COLOURS), SIZES, FORMS, STYLES))
    names = [f"{size} {colour} {form}" for (_, colour), size, form, _ in rows]
    return Pictures(
        images=np.stack([_draw(number / len(COLOURS), size, form, style) for (number, _), size, form, style in rows]),
        captions=[[name] for name in names],
        styles=[style for _, _, _, style in rows],
        classes=np.array([FORMS.index(form) for _, _, form, _ in rows]),
        class_names=list(FORMS),
        weights=np.ones(len(rows), dtype=np.float32),
        concepts=names,
    )


def _draw(hue: float, size: str, form: str, style: str) -> np.ndarray:
    colour = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 0.9))
    picture = Image.new("RGB", (32, 32), "white")
    draw, half = ImageDraw.Draw(picture), SIZES[size]
    box = (16 - half, 16 - half, 16 + half, 16 + half)
    outline = {"outline": "black", "width": 2} if style == "3d" else {}
    (draw.ellipse if form == "cat" else draw.rectangle)(box, fill=colour, **outline)
    return np.asarray(picture)


def trained_in_a_moment(folder: Path) -> tuple[Path, Path]:
    """Save the table, and train a bundle on it for a moment. The judge is in `folder / "judge"`."""
    table, data = shapes(), folder / "table.npz"
    table.save(data)
    train_judge(table, folder / "judge", JudgeRecipe(steps=5, batch=16), "none")
    train_autoencoder(
        table,
        folder / "autoencoder",
        AutoencoderRecipe(width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 0), steps=3, perceptual=0),
    )
    small, once = Size(32, 1), Recipe(steps=1, batch=4)
    return data, train_model("class", table, folder / "autoencoder", folder / "runs" / "first", once, small, "none")

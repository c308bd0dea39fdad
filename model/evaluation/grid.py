"""The eye test: a hundred generated pictures beside the hundred real ones with the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from patchforge.model.errors import DataError
from patchforge.model.evaluation.samples import make_pictures, words_for
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler
from patchforge.model.training.data import Pictures

SIDE = 10
MARGIN = 4
LINES = 2
LINE_HEIGHT = 10
GAP = 24
"""Pixels between the two grids."""


def write_grid(pipeline: Pipeline, pictures: Pictures, sampler: Sampler[Any], out: Path, seed: int = 0) -> None:
    """Write two grids of `SIDE`² pictures to `out`: generated, and real.

    The real pictures are drawn by weight from those used in training, no two of the same concept.

    Raises:
        DataError: there are too few concepts, or `out` has an unknown picture format.
    """
    if out.suffix.lower() not in Image.registered_extensions():
        raise DataError(f"{out}: unknown picture format")
    shown = pictures.where(_draw_concepts(pictures, SIDE**2, seed)).resized(pipeline.manifest.size[0])
    words = words_for(pipeline, shown)
    made = make_pictures(pipeline, sampler, words, range(seed, seed + len(words)), "grid").pictures
    size = shown.images.shape[1]
    cell = size + 2 * MARGIN, size + 2 * MARGIN + LINES * LINE_HEIGHT
    canvas = Image.new("RGB", (2 * SIDE * cell[0] + GAP, SIDE * cell[1]), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(9)
    for left, images in ((0, made), (SIDE * cell[0] + GAP, torch.from_numpy(shown.images))):
        for number, (picture, name) in enumerate(zip(images, words, strict=True)):
            x, y = left + number % SIDE * cell[0] + MARGIN, number // SIDE * cell[1] + MARGIN
            canvas.paste(Image.fromarray(picture.numpy()), (x, y))
            for line, text in enumerate(_break_lines(name, font, size + MARGIN)):
                draw.text((x, y + size + line * LINE_HEIGHT), text, "black", font)
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(out)


def _draw_concepts(pictures: Pictures, count: int, seed: int) -> np.ndarray:
    """Draw `count` pictures of different concepts, as a boolean mask `(n,)`."""
    weights = np.where(pictures.trained(), pictures.weights.astype(float), 0.0)
    chosen = np.zeros(len(pictures), bool)
    concepts: set[str] = set()
    order = np.random.default_rng(seed).choice(len(weights), np.count_nonzero(weights), False, weights / weights.sum())
    for row in order:
        if len(concepts) < count and pictures.concepts[row] not in concepts:
            concepts.add(pictures.concepts[row])
            chosen[row] = True
    if len(concepts) < count:
        raise DataError(f"a grid needs pictures of {count} concepts; there are {len(concepts)}")
    return chosen


def _break_lines(text: str, font: Any, width: int) -> list[str]:
    """Break text into at most `LINES` lines that fit, at spaces where possible."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:LINES]
    for number, line in enumerate(shown):
        cut = number == LINES - 1 and len(lines) > LINES
        while font.getlength(line + ("…" if cut else "")) > width and len(line) > 1:
            line, cut = line[:-1], True
        shown[number] = line + ("…" if cut else "")
    return shown

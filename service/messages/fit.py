"""How a picture comes to a size of another shape: where it is cropped, and where it lies in the new size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

Size = tuple[int, int]
"""Width and height."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""
ALIKE = 0.01
"""Shapes count as the same up to this part: rounding to whole pixels makes such differences."""


class Fit(StrEnum):
    """What gives way if the shapes differ."""

    CONTAIN = "contain"
    """Nothing: the whole picture is there, with white bars beside it."""
    COVER = "cover"
    """The picture's edges: they are cropped."""
    STRETCH = "stretch"
    """The picture's proportions."""


class Placement(NamedTuple):
    """The `crop` of a picture fills the `place` in a canvas."""

    crop: Box
    place: Box


def is_same_shape(one: Size, other: Size) -> bool:
    """Whether one size can become the other without a visible change of proportions."""
    crossed = one[0] * other[1], one[1] * other[0]
    return abs(crossed[0] - crossed[1]) <= ALIKE * max(crossed)


def nearest_native(sizes: Sequence[Size], asked: Size) -> Size:
    """Chooses which of a model's native sizes to draw for a picture of the size asked for.

    The shape counts most: what is cropped, or lies beside the picture, is drawn for nothing. Of the sizes of the best
    shape, it is the smallest with enough pixels, or else the largest.
    """

    def difference(size: Size) -> float:
        return abs(math.log(size[0] * asked[1] / (size[1] * asked[0])))

    least = min(map(difference, sizes))
    shaped = sorted((size for size in sizes if difference(size) <= least + ALIKE), key=math.prod)
    return next((size for size in shaped if math.prod(size) >= math.prod(asked)), shaped[-1])


def place(picture: Size, canvas: Size, fit: Fit) -> Placement:
    """Places a picture in a canvas."""
    whole, everywhere = (0, 0, *picture), (0, 0, *canvas)
    if fit is Fit.STRETCH or is_same_shape(picture, canvas):
        return Placement(whole, everywhere)
    if fit is Fit.COVER:
        return Placement(_middle(picture, canvas), everywhere)
    return Placement(whole, _middle(canvas, picture))


def size_of(box: Box) -> Size:
    """The width and height of a box."""
    return box[2] - box[0], box[3] - box[1]


def _middle(size: Size, shape: Size) -> Box:
    """The largest box of this shape in the middle of `size`, of at least one pixel a side."""
    width = min(size[0], max(1, round(size[1] * shape[0] / shape[1])))
    height = min(size[1], max(1, round(size[0] * shape[1] / shape[0])))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height

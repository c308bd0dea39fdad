"""Where a picture is cropped and where it comes to lie, for any two shapes."""

from __future__ import annotations

import pytest

from patchforge.service.messages.fit import Box, Fit, Size, is_same_shape, nearest_native, place, size_of


@pytest.mark.parametrize(
    ("fit", "picture", "canvas", "crop", "box"),
    [
        (Fit.CONTAIN, (200, 100), (100, 100), (0, 0, 200, 100), (0, 25, 100, 75)),
        (Fit.CONTAIN, (64, 64), (96, 64), (0, 0, 64, 64), (16, 0, 80, 64)),
        (Fit.COVER, (200, 100), (100, 100), (50, 0, 150, 100), (0, 0, 100, 100)),
        (Fit.COVER, (64, 64), (96, 48), (0, 16, 64, 48), (0, 0, 96, 48)),
        (Fit.STRETCH, (200, 100), (100, 100), (0, 0, 200, 100), (0, 0, 100, 100)),
        (Fit.CONTAIN, (4096, 1), (16, 2048), (0, 0, 4096, 1), (0, 1023, 16, 1024)),
        (Fit.COVER, (4096, 1), (16, 2048), (2047, 0, 2048, 1), (0, 0, 16, 2048)),
    ],
)
def test_placement(fit: Fit, picture: Size, canvas: Size, crop: Box, box: Box) -> None:
    assert place(picture, canvas, fit) == (crop, box)


@pytest.mark.parametrize("fit", Fit)
@pytest.mark.parametrize(
    ("one", "other"), [((64, 64), (256, 256)), ((1000, 667), (1536, 1024)), ((64, 64), (255, 256))]
)
def test_the_same_shape_is_filled_whole(fit: Fit, one: Size, other: Size) -> None:
    assert is_same_shape(one, other)
    assert place(one, other, fit) == ((0, 0, *one), (0, 0, *other))


@pytest.mark.parametrize("fit", [Fit.CONTAIN, Fit.COVER])
@pytest.mark.parametrize("picture", [(16, 2048), (100, 37), (333, 334), (4096, 4096)])
@pytest.mark.parametrize("canvas", [(2048, 16), (64, 64), (96, 65)])
def test_proportions_are_kept_and_nothing_reaches_beyond(fit: Fit, picture: Size, canvas: Size) -> None:
    crop, box = place(picture, canvas, fit)
    assert 0 <= crop[0] < crop[2] <= picture[0]
    assert 0 <= crop[1] < crop[3] <= picture[1]
    assert 0 <= box[0] < box[2] <= canvas[0]
    assert 0 <= box[1] < box[3] <= canvas[1]
    (width, height), (cut_width, cut_height) = size_of(box), size_of(crop)
    errors = abs(width - cut_width * height / cut_height), abs(height - cut_height * width / cut_width)
    pixel = max(1.0, height / cut_height, width / cut_width)
    assert min(errors) <= pixel, "up to the rounding of one side to whole pixels"


NATIVE = [(256, 256), (128, 128), (256, 128), (128, 256)]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ((256, 256), (256, 256)),
        ((128, 128), (128, 128)),
        ((64, 64), (128, 128)),
        ((129, 129), (256, 256)),
        ((1024, 1024), (256, 256)),
        ((256, 128), (256, 128)),
        ((1024, 400), (256, 128)),
        ((100, 300), (128, 256)),
        ((150, 128), (256, 256)),
    ],
)
def test_the_native_size_nearest_in_shape_and_then_large_enough(asked: Size, chosen: Size) -> None:
    assert nearest_native(NATIVE, asked) == chosen
    assert nearest_native(NATIVE[::-1], asked) == chosen


def test_a_model_of_one_size_draws_that() -> None:
    assert nearest_native([(64, 64)], (2048, 16)) == (64, 64)

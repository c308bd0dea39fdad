"""Training pictures: what a folder says of them, what survives the disk, and what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.errors import DataError
from model.training.data import Pictures, folder_pictures, load_picture, phrasings


def test_a_folder_gives_captions_and_classes(folder: Path) -> None:
    pictures = folder_pictures(folder, 16)
    assert pictures.images.shape == (60, 16, 16, 3)
    assert pictures.class_names == ["blue", "red"]
    row = pictures.concepts.index("red/red-0.png")
    assert pictures.captions[row] == ["a red square", "something red"]
    assert pictures.captions[0] == ["blue 0"]


def test_pictures_survive_the_disk_and_a_broken_table_is_refused(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 16)
    pictures.save(tmp_path / "table.npz")
    again = Pictures.load(tmp_path / "table.npz")
    assert np.array_equal(again.images, pictures.images)
    assert again.captions == pictures.captions
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    for path in (tmp_path / "broken.npz", tmp_path / "absent.npz"):
        with pytest.raises(DataError):
            Pictures.load(path)
    with pytest.raises(DataError, match="no pictures"):
        folder_pictures(tmp_path / "empty")


def test_pictures_are_composited_on_white_and_padded(tmp_path: Path) -> None:
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png", 8).min() == 255
    Image.new("RGB", (10, 20), "black").save(tmp_path / "tall.png")
    tall = load_picture(tmp_path / "tall.png", 8)
    assert tall[4, 4].max() < 10
    assert tall[4, 0].min() > 245


def test_a_concept_is_held_out_in_all_its_styles() -> None:
    names = [f"thing {i}" for i in range(500)] * 2
    count = len(names)
    pictures = Pictures(
        np.zeros((count, 1, 1, 3)),
        [[n] for n in names],
        [""] * count,
        np.zeros(count, int),
        ["x"],
        np.ones(count),
        names,
    )
    held = pictures.held_out(0.1)
    assert np.array_equal(held[:500], held[500:])
    assert 0.05 < held.mean() < 0.15


def test_prompts_come_with_and_without_the_style_word() -> None:
    assert phrasings(["red apple", "apple"], "3d") == ["red apple, 3d", "red apple", "apple, 3d", "apple"]
    assert phrasings(["red apple"], "") == ["red apple"]

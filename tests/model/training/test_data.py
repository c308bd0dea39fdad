"""Training pictures: what a folder says about them, what is saved, and what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchforge.model.errors import DataError
from patchforge.model.training.data import Pictures, folder_pictures, load_picture, phrasings


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
    (tmp_path / "empty.npz").write_bytes(b"")
    for path in (tmp_path / "broken.npz", tmp_path / "absent.npz", tmp_path / "empty.npz"):
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


def test_a_camera_s_picture_is_upright_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste("black", (0, 0, 16, 8))  # black above
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned to the right: what was above is at the right then
    picture.save(tmp_path / "phone.jpg", exif=turned, quality=95)
    shown = load_picture(tmp_path / "phone.jpg", 16)
    assert shown[8, 12].max() < 30
    assert shown[8, 3].min() > 225
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "phone.jpg").read_bytes()[:40])
    (tmp_path / "words.png").write_text("no picture")
    for name in ("torn.jpg", "words.png"):
        with pytest.raises(DataError, match=name):
            load_picture(tmp_path / name, 16)


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


def drawn(styles: dict[str, list[str]], size: int = 1) -> Pictures:
    """A table of plain pictures: concept → its styles."""
    rows = [(concept, style) for concept, each in styles.items() for style in each]
    return Pictures(
        np.arange(len(rows) * size * size * 3, dtype=np.uint8).reshape(len(rows), size, size, 3),
        [[concept] for concept, _ in rows],
        [style for _, style in rows],
        np.zeros(len(rows), int),
        ["x"],
        np.ones(len(rows)),
        [concept for concept, _ in rows],
    )


def test_a_held_out_combination_leaves_its_concept_at_least_two_other_styles() -> None:
    styles = ["3d", "noto", "flat", "blob"]
    pictures = drawn({f"thing {i}": styles[: 1 + i % 4] for i in range(400)})
    whole, pairs = pictures.held_out(), pictures.held_out_combinations(0.4)
    assert not (whole & pairs).any()
    assert np.array_equal(pictures.trained(), ~(whole | pictures.held_out_combinations()))
    kept: dict[str, int] = {}
    for concept, gone in zip(pictures.concepts, pairs, strict=True):
        kept[concept] = kept.get(concept, 0) + (not gone)
    for row in np.flatnonzero(pairs):
        assert kept[pictures.concepts[row]] >= 2
    assert 0.15 < pairs.mean() < 0.4  # at most two of four styles are held out, one of three, none of fewer


def test_the_same_combinations_are_held_out_in_any_order() -> None:
    pictures = drawn({f"thing {i}": ["3d", "noto", "flat"] for i in range(300)})
    order = np.random.default_rng(0).permutation(len(pictures))
    assert np.array_equal(pictures.rows(order).held_out_combinations(), pictures.held_out_combinations()[order])
    assert pictures.held_out_combinations().any()


def test_pictures_are_resized_and_nothing_else_changes() -> None:
    pictures = drawn({"thing": ["3d", "noto"]}, size=4)
    assert pictures.resized(4) is pictures
    small = pictures.resized(2)
    assert small.images.shape == (2, 2, 2, 3)
    assert abs(int(small.images[0].mean()) - int(pictures.images[0].mean())) <= 2
    assert (small.captions, small.styles, small.concepts) == (pictures.captions, pictures.styles, pictures.concepts)


def test_prompts_come_with_and_without_the_style_word() -> None:
    assert phrasings(["red apple", "apple"], "3d") == [("red apple, 3d", "red apple"), ("apple, 3d", "apple")]
    assert phrasings(["red apple"], "") == [("red apple", "red apple")]


def test_the_pictures_of_some_styles_are_drawn_more_often() -> None:
    pictures = drawn({"thing": ["3d", "noto"]}, size=4)
    more = pictures.drawn_more(["noto"])
    assert dict(zip(more.styles, more.weights.tolist(), strict=True)) == {"3d": 1, "noto": 4}
    assert pictures.weights.tolist() == [1, 1]
    with pytest.raises(DataError, match="3d, noto"):
        pictures.drawn_more(["crayon"])

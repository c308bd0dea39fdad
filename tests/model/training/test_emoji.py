"""The emoji table from invented packages: its pictures, their names, and mirrored aliases."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchforge.model.errors import DataError
from patchforge.model.training.emoji import DRAWN_PACKAGES, NAMES_PACKAGE, RASTER_PACKAGE, emoji_pictures

LEFT_RED = '<path fill="#ff0000" d="M0 0h5v10H0z"/>'
INDEX = [
    {
        "name": "FOX FACE",
        "unified": "1F98A",
        "short_names": ["fox_face"],
        "category": "Animals & Nature",
        "subcategory": "animal-mammal",
    },
    {
        "name": "WHITE LEFT POINTING BACKHAND INDEX",
        "unified": "1F448",
        "short_names": ["point_left"],
        "category": "People & Body",
        "subcategory": "hand",
        "skin_variations": {"1F3FB": {"unified": "1F448-1F3FB"}},
    },
    {
        "name": "WHITE RIGHT POINTING BACKHAND INDEX",
        "unified": "1F449",
        "short_names": ["point_right"],
        "category": "People & Body",
        "subcategory": "hand",
    },
    {
        "name": "France Flag",
        "unified": "1F1EB-1F1F7",
        "short_names": ["fr"],
        "category": "Flags",
        "subcategory": "country-flag",
    },
    {
        "name": "HEAVY BLACK HEART",
        "unified": "2764-FE0F",
        "short_names": ["heart"],
        "category": "Smileys & Emotion",
        "subcategory": "heart",
    },
]
CHARS = {"1f98a": "fox", "1f448": "index-left", "1f449": "index-right", "2764": "red-heart", "1f1eb-1f1f7": "flag-fr"}


def pack(folder: Path, package: str, files: dict[str, bytes]) -> None:
    name, _, version = package.rpartition("@")
    with tarfile.open(folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", "w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def icons(chars: dict[str, str], names: list[str], **more: Any) -> dict[str, bytes]:
    sheet = {"width": 10, "height": 10, "icons": {name: {"body": LEFT_RED} for name in names}, **more}
    return {"icons.json": json.dumps(sheet).encode(), "chars.json": json.dumps(chars).encode()}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Two sets with code points, one of which mirrors a hand; three sets with names only; and one without any use."""
    raster = io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(raster, "webp")
    pack(tmp_path, NAMES_PACKAGE, {"emoji.json": json.dumps(INDEX).encode()})
    assets = ("1f98a", "1f448-1f3fb", "1f1eb-1f1f7", "2764-fe0f")
    pack(tmp_path, RASTER_PACKAGE, {f"assets/{code}.webp": raster.getvalue() for code in assets})
    mirrored = {"aliases": {"index-right": {"parent": "index-left", "hFlip": True}}}
    sets = {
        "noto": icons(CHARS, list(CHARS.values())),
        "flat": icons(CHARS, ["index-left"])
        | icons({k: CHARS[k] for k in ("1f448", "1f449")}, ["index-left"], **mirrored),
        "fluent": icons({"1f98a": "fox"}, ["fox"]),
        "blob": icons({}, ["red-heart", "unheard-of"]),
        "emojione": icons({}, ["fox-face"]),
        "fxemoji": icons({}, ["foxface", "heart"]),
    }
    for style, package in DRAWN_PACKAGES.items():
        pack(tmp_path, package, sets[style])
    return tmp_path


def test_the_table_has_every_emoji_once_a_style_without_tones_and_flags(packages: Path) -> None:
    pictures = emoji_pictures(packages, 20)
    shown = sorted(zip(pictures.styles, pictures.concepts, strict=True))
    left, right = "white left pointing backhand index", "white right pointing backhand index"
    assert shown == sorted(
        [("3d", "fox face"), ("3d", "heavy black heart"), ("flat", left), ("flat", right), ("fluent", "fox face")]
        + [("noto", name) for name in ("fox face", left, right, "heavy black heart")]
        + [("blob", "heavy black heart"), ("emojione", "fox face"), ("fxemoji", "fox face")]
        + [("fxemoji", "heavy black heart")]
    )
    assert pictures.images.shape == (len(shown), 20, 20, 3)
    assert pictures.class_names == ["animal-mammal", "hand", "heart"]
    assert pictures.captions[pictures.concepts.index("fox face")] == ["fox face", "fox"]


def test_drawings_are_rendered_on_white_and_mirrored_where_the_set_says_so(packages: Path) -> None:
    pictures = emoji_pictures(packages, 20)
    rows = {key: row for row, key in enumerate(zip(pictures.styles, pictures.concepts, strict=True))}
    red, white = np.array([255, 0, 0]), np.array([255, 255, 255])
    left = pictures.images[rows["flat", "white left pointing backhand index"]]
    right = pictures.images[rows["flat", "white right pointing backhand index"]]
    assert np.array_equal(left[10, 4], red)
    assert np.array_equal(left[10, 15], white)
    assert np.array_equal(right, left[:, ::-1])


def test_a_missing_package_is_named(packages: Path) -> None:
    (packages / "iconify-json-fxemoji-1.2.2.tgz").unlink()
    with pytest.raises(DataError, match="fxemoji"):
        emoji_pictures(packages, 20)

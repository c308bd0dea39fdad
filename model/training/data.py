"""Training pictures: one table in memory, and how to build it from a folder of your own pictures."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patchforge.model.errors import DataError

PATCH_SIZE = 2
"""Latents on a side of one patch of the networks that are trained here."""
FINEST_PATCH = 8
"""Pixels on a side of the smallest patch that any autoencoder of ours makes."""
KEPT_STYLES = 2
"""Fewest other styles in which the concept of a held-out combination is trained."""
PICTURE_SUFFIXES = {".png", ".webp", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Pictures:
    """A data set in memory.

    `images` is `(n, size, size, 3)` uint8. `captions[i]` lists the names of picture *i*. `styles[i]` is a style word
    or `""`. `classes[i]` is an index into `class_names`. `weights[i]` says how often the picture is drawn, relative to
    the others. `concepts[i]` names what is shown in any style, so that a held-out split holds out whole concepts.
    """

    images: np.ndarray
    captions: list[list[str]]
    styles: list[str]
    classes: np.ndarray
    class_names: list[str]
    weights: np.ndarray
    concepts: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def where(self, mask: np.ndarray) -> Pictures:
        """Select the pictures where `mask` `(n,)` is true."""
        return self.rows(np.flatnonzero(mask))

    def rows(self, rows: np.ndarray) -> Pictures:
        """Select the pictures with indices `rows` `(m,)`, in that order."""
        return Pictures(
            self.images[rows],
            [self.captions[row] for row in rows],
            [self.styles[row] for row in rows],
            self.classes[rows],
            self.class_names,
            self.weights[rows],
            [self.concepts[row] for row in rows],
        )

    def save(self, path: Path) -> None:
        """Write the table as one lightly compressed `.npz` file, without pickled objects."""
        text = json.dumps(
            {
                "captions": self.captions,
                "styles": self.styles,
                "class_names": self.class_names,
                "concepts": self.concepts,
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = {"images": self.images, "classes": self.classes, "weights": self.weights}
        tables["text"] = np.frombuffer(text.encode(), dtype=np.uint8)
        partial = path.with_name(f"{path.name}.partial")
        # Like np.savez_compressed, whose compression level 6 takes minutes for gigabytes.
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, table in tables.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.ascontiguousarray(table), allow_pickle=False)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Pictures:
        """Read a file that `save` wrote.

        Raises:
            DataError: the file is missing, or is not such a table.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as table:
                text = json.loads(table["text"].tobytes())
                return cls(
                    images=table["images"],
                    classes=table["classes"],
                    weights=table["weights"],
                    **text,
                )
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} is not a picture table: {error}") from error

    def held_out(self, share: float = 0.02) -> np.ndarray:
        """Select the held-out pictures as a boolean mask `(n,)`: about `share` of the concepts, but at least one.

        The concept's name decides. So all styles of a concept are on the same side, in any order of the data set.

        Raises:
            DataError: there are fewer than two concepts.
        """
        if len(set(self.concepts)) < 2:
            raise DataError("training needs at least two different pictures")
        scores = np.array([_score(concept) for concept in self.concepts])
        return scores < max(share, np.nextafter(scores.min(), 1))

    def held_out_combinations(self, share: float = 0.04) -> np.ndarray:
        """Select held-out combinations of concept and style as a boolean mask `(n,)`; other styles are trained.

        About `share` of the combinations are chosen by name, from concepts that are not held out, and only if at
        least `KEPT_STYLES` other styles of the concept remain. Call this on the whole table, because the table says
        which styles a concept has.
        """
        concepts: dict[str, dict[str, float]] = {}
        for concept, style, whole in zip(self.concepts, self.styles, self.held_out(), strict=True):
            if not whole:
                concepts.setdefault(concept, {})[style] = _score(f"{concept}, {style}")
        chosen = set()
        for concept, scores in concepts.items():
            spare = len(scores) - KEPT_STYLES
            low = sorted(style for style, score in scores.items() if score < share)
            low.sort(key=scores.__getitem__)
            chosen |= {(concept, style) for style in low[: max(0, spare)]}
        pairs = zip(self.concepts, self.styles, strict=True)
        return np.array([pair in chosen for pair in pairs])

    def trained(self) -> np.ndarray:
        """Select the pictures to train on as a boolean mask `(n,)`: neither concept nor combination is held out."""
        return ~(self.held_out() | self.held_out_combinations())

    def drawn_more(self, styles: Sequence[str], factor: float = 4.0) -> Pictures:
        """Draw the pictures of these styles `factor` times as often as the others.

        Raises:
            DataError: there is no such style.
        """
        if unknown := sorted(set(styles) - set(self.styles)):
            raise DataError(f"no picture has the style {unknown[0]!r}; there are {', '.join(sorted(set(self.styles)))}")
        more = np.isin(np.array(self.styles), list(styles))
        return replace(self, weights=np.where(more, factor * self.weights, self.weights).astype(self.weights.dtype))

    def resized(self, size: int) -> Pictures:
        """Return the pictures at `size` × `size` pixels; this table itself if they have that size."""
        if self.images.shape[1] == size:
            return self
        images = np.empty((len(self), size, size, 3), np.uint8)
        for row, image in enumerate(self.images):
            images[row] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
        return replace(self, images=images)


def check_side(side: int, multiple: int, what: str) -> None:
    """Check that pictures of this size can be cut into whole patches.

    Args:
        side: in pixels.
        multiple: pixels on a side of one patch.
        what: names the size in errors.

    Raises:
        DataError: they cannot; the message names the nearest sizes that can.
    """
    if side >= multiple and side % multiple == 0:
        return
    below = max(1, side // multiple) * multiple
    raise DataError(
        f"{what} is {side} pixels, and must be a multiple of {multiple}, such as {below} or {below + multiple}"
    )


def load_picture(source: Path | bytes, size: int) -> np.ndarray:
    """Decode a picture, turn it as its camera says, put it on white, pad it to a square, and resize it.

    Returns `(size, size, 3)` uint8.

    Raises:
        DataError: it is damaged, or no picture.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "a downloaded picture" if isinstance(source, bytes) else source
        raise DataError(f"{what} cannot be read: {error}") from error
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def folder_pictures(folder: Path, size: int = 64) -> Pictures:
    """Build the table from your own pictures.

    The caption of `cat.png` is the text file `cat.txt`, with one name per line; without it, the file's name. A
    picture's class is its subfolder.

    Raises:
        DataError: `folder` has no pictures.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} has no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    names = [path.parent.name if path.parent != folder else "" for path in paths]
    class_names = sorted(set(names))
    return Pictures(
        images=np.stack([load_picture(path, size) for path in paths]),
        captions=[_folder_captions(path) for path in paths],
        styles=[""] * len(paths),
        classes=np.array([class_names.index(name) for name in names]),
        class_names=class_names,
        weights=np.ones(len(paths), dtype=np.float32),
        concepts=[str(path.relative_to(folder)) for path in paths],
    )


def phrasings(names: Sequence[str], style: str) -> list[tuple[str, str]]:
    """List the prompts that a picture may be trained with: each name, with and without its style word."""
    return [(f"{name}, {style}" if style else name, name) for name in names]


def _folder_captions(path: Path) -> list[str]:
    sidecar = path.with_suffix(".txt")
    if sidecar.exists():
        lines = [line.strip() for line in sidecar.read_text(encoding="utf-8").splitlines()]
        if any(lines):
            return [line for line in lines if line]
    return [path.stem.replace("_", " ").replace("-", " ")]


def _score(name: str) -> float:
    """Map a name to [0, 1): like a random number, but always the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32

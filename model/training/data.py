"""Training pictures: the emoji sets from npm, or a folder of one's own, as one in-memory table."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from model.errors import DataError

EMOJI_PACKAGES = {
    # style word → (npm package, folder of the pictures inside it)
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets"),
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64"),
    "flat": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64"),
}
EMOJI_INDEX = ("noto", "package/emoji.json")
PICTURE_SUFFIXES = {".png", ".webp", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Pictures:
    """A data set held in memory.

    ``images`` is ``(n, size, size, 3)`` uint8; ``captions[i]`` lists the names picture *i* goes by;
    ``styles[i]`` is a style word or ``""``; ``classes[i]`` indexes ``class_names``;
    ``weights[i]`` is how often the picture is drawn, relative to the others;
    ``concepts[i]`` names what is shown, whatever the style, so that a held-out split holds out concepts.
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
        """The pictures for which the boolean ``mask`` ``(n,)`` holds."""
        return self.rows(np.flatnonzero(mask))

    def rows(self, rows: np.ndarray) -> Pictures:
        """The pictures numbered ``rows`` ``(m,)``, in that order."""
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
        """Write the table as one compressed ``.npz`` (no pickled objects inside)."""
        text = json.dumps(
            {
                "captions": self.captions,
                "styles": self.styles,
                "class_names": self.class_names,
                "concepts": self.concepts,
            }
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            images=self.images,
            classes=self.classes,
            weights=self.weights,
            text=np.frombuffer(text.encode(), dtype=np.uint8),
        )

    @classmethod
    def load(cls, path: Path) -> Pictures:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing or not such a table.
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
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise DataError(f"{path} is not a picture table: {error}") from error

    def held_out(self, share: float = 0.02) -> np.ndarray:
        """Boolean mask ``(n,)`` of the held-out pictures: about ``share`` of the concepts, but at least one.

        They are chosen by name, so all styles and skin tones of a concept fall on the same side, whatever the
        data set's order.

        Raises:
            DataError: there are not two concepts to tell apart.
        """
        if len(set(self.concepts)) < 2:
            raise DataError("training needs at least two different pictures")
        digests = (hashlib.sha256(concept.encode()).digest() for concept in self.concepts)
        scores = np.array([int.from_bytes(digest[:4], "big") / 2**32 for digest in digests])
        return scores < max(share, np.nextafter(scores.min(), 1))


def load_picture(source: Path | bytes, size: int) -> np.ndarray:
    """Decode, composite on white, pad to a square, resize to ``(size, size, 3)`` uint8."""
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
        picture = opened.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def fetch_emoji(folder: Path) -> None:
    """Download the three emoji packages into ``folder`` with ``npm pack`` (about 150 MB, once).

    Raises:
        DataError: npm is missing or refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, _ in EMOJI_PACKAGES.values():
        if _tarball(folder, package).exists():
            continue
        try:
            subprocess.run(
                ["npm", "pack", "--silent", package],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError as error:
            raise DataError("npm is needed once, to fetch the emoji packages; it is not on PATH") from error
        except subprocess.CalledProcessError as error:
            raise DataError(f"npm pack {package} failed: {error.stderr.strip()[-500:]}") from error


def emoji_pictures(folder: Path, size: int = 64) -> Pictures:
    """Build the table from the packages `fetch_emoji` left in ``folder``.

    An emoji's skin-tone variants share the weight of one picture, so that a hand is not drawn six times as
    often as an apple; country flags weigh a third, being 259 near-duplicates of one idea.
    """
    index_style, index_path = EMOJI_INDEX
    with tarfile.open(_tarball(folder, EMOJI_PACKAGES[index_style][0])) as archive:
        index = json.loads(_member(archive, index_path))
    entries = {entry.code: entry for entry in _emoji_entries(index)}
    class_names = sorted({entry.subgroup for entry in entries.values()})
    rows: list[tuple[np.ndarray, _Emoji, str]] = []
    for style, (package, inside) in EMOJI_PACKAGES.items():
        with tarfile.open(_tarball(folder, package)) as archive:
            for member in archive:
                path = Path(member.name)
                entry = entries.get(_plain_code(path.stem))
                if path.parent.as_posix() != inside or entry is None:
                    continue
                rows.append((load_picture(_member(archive, member), size), entry, style))
    if not rows:
        raise DataError(f"no emoji pictures found in {folder}")
    return Pictures(
        images=np.stack([image for image, _, _ in rows]),
        captions=[entry.names for _, entry, _ in rows],
        styles=[style for _, _, style in rows],
        classes=np.array([class_names.index(entry.subgroup) for _, entry, _ in rows]),
        class_names=class_names,
        weights=np.array([entry.weight for _, entry, _ in rows], dtype=np.float32),
        concepts=[entry.concept for _, entry, _ in rows],
    )


def folder_pictures(folder: Path, size: int = 64) -> Pictures:
    """Build the table from one's own pictures.

    A picture's caption is the text file beside it (``cat.png`` + ``cat.txt``, one name a line), else its file
    name; its class is the subfolder it lies in.

    Raises:
        DataError: there is no picture in ``folder``.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise DataError(f"no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) in {folder}")
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


def phrasings(names: Sequence[str], style: str) -> list[str]:
    """The prompts a picture may be trained under: each of its names, with and without its style word."""
    if not style:
        return list(names)
    return [phrase for name in names for phrase in (f"{name}, {style}", name)]


@dataclass(frozen=True)
class _Emoji:
    code: str
    concept: str
    names: list[str]
    subgroup: str
    weight: float


def _emoji_entries(index: list[dict[str, Any]]) -> Iterator[_Emoji]:
    for item in index:
        if item["category"] == "Component":
            continue
        name = item["name"].lower()
        variations = item.get("skin_variations", {})
        weight = 1 / 3 if item["subcategory"] == "country-flag" else 1.0
        weight /= 1 + len(variations)
        aliases = [alias.replace("_", " ").replace("-", " ") for alias in item["short_names"]]
        names = list(dict.fromkeys([name, *(a for a in aliases if not a.startswith("flag ") and len(a) > 2)]))
        subgroup = item["subcategory"]
        yield _Emoji(_plain_code(item["unified"]), name, names, subgroup, weight)
        for tones, variation in variations.items():
            tone = _tone_name(tones.split("-")[0])
            toned = [f"{each}: {tone} skin tone" for each in names]
            yield _Emoji(_plain_code(variation["unified"]), name, toned, subgroup, weight)


def _tone_name(code: str) -> str:
    return {
        "1F3FB": "light",
        "1F3FC": "medium light",
        "1F3FD": "medium",
        "1F3FE": "medium dark",
        "1F3FF": "dark",
    }[code]


def _plain_code(code: str) -> str:
    """``1F441-FE0F`` → ``1f441``: packages disagree on the variation selector, so it is left out."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _tarball(folder: Path, package: str) -> Path:
    name, _, version = package.rpartition("@")
    return folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def _member(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise DataError(f"{member!r} is not a file in {archive.name!r}")
    return stream.read()


def _folder_captions(path: Path) -> list[str]:
    sidecar = path.with_suffix(".txt")
    if sidecar.exists():
        lines = [line.strip() for line in sidecar.read_text(encoding="utf-8").splitlines()]
        if any(lines):
            return [line for line in lines if line]
    return [path.stem.replace("_", " ").replace("-", " ")]

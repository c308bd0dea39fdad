"""Files in folders from strangers: inside the folder, of bounded size; and what is said of what is wrong in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from patchforge.model.errors import BundleError
from patchforge.model.storage.autoencoder_config import AUTOENCODERS
from patchforge.model.storage.weights import printable

MAX_JSON = 8 << 20


def require_file(folder: Path, name: str) -> Path:
    """Return the path of the file `name`, which must exist and must not lead out of `folder` by a link."""
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path}: no such file")
    require_inside(folder, path)
    return path


def require_inside(folder: Path, path: Path) -> None:
    """Raise BundleError if `path` leads out of `folder` by a link."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: a link that leads out of {folder}; put the file itself there")


def read_json(path: Path, limit: int = MAX_JSON) -> bytes:
    """Read a JSON file of bounded size. The caller's schema checks the rest."""
    try:
        if path.stat().st_size > limit:
            raise BundleError(f"{path}: more than {limit:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def hash_files(folder: Path, names: Iterable[str]) -> str:
    """Return the SHA-256 of some files of a folder and of their names, in hexadecimal.

    Raises:
        BundleError: a file cannot be read.
    """
    return hash_hashes({name: hash_file(folder / name) for name in names})


def hash_hashes(hashes: Mapping[str, str]) -> str:
    """Return the SHA-256 of files, given the SHA-256 of each by its name; all in hexadecimal."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def mention_pickles(folder: Path) -> str:
    """Return a part of a message about missing weights: which pickles lie there instead, if any."""
    pickles = sorted(file.name for suffix in ("bin", "ckpt", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
    return f". {pickles[0]} is a pickle, which can run code, so it is never loaded" if pickles else ""


def explain_error(error: ValidationError) -> str:
    """Describe the first problem, such as `network.config.depth: Input should be …`, and count the others."""
    problems = error.errors(include_url=False, include_context=False)
    first, more = problems[0], len(problems) - 1
    # Pydantic puts a union's tag among the field names: below these fields, and at the root of an autoencoder's config.
    location = [str(part) for part in first["loc"]]
    tag = 1 if location[:1] in (["network"], ["text_encoder"]) else None
    tag = 0 if location[:1] and location[0] in AUTOENCODERS else tag
    place = [part for index, part in enumerate(location) if index != tag]
    message = first["msg"].removeprefix("Value error, ")
    named = f"{'.'.join(place)}: {message}" if place else message
    return printable(named, 500) + (f" (and {more} more)" if more else "")

"""A folder of numbered samples: which are missing, and all of them in one `.npz`. Free of torch."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

SETTINGS = "samples.json"
"""What all samples of the folder were made with."""


@dataclass(frozen=True)
class Subjects:
    """The prompt or class of every sample, by its index alone."""

    words: Sequence[str]
    """Prompts, or classes."""
    at_random: int | None = None
    """Seed that draws one of them for each sample; None: they take turns."""

    def of(self, index: int) -> str:
        """Return the words of a sample."""
        if self.at_random is None:
            return self.words[index % len(self.words)]
        return random.Random(f"{self.at_random} {index}").choice(self.words)


class SampleFolder:
    """Samples as `000000.png`, `000001.png`, …. Each is written whole or not at all, so a killed run can go on."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or go on with it if its samples were made with the same settings.

        Raises:
            InvalidRequest: they were made with others, or the folder is not one of samples.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(settings))
        path = self.folder / SETTINGS
        if path.exists():
            self._check(path, wanted)
        elif any(self.folder.glob("*.png")):
            raise InvalidRequest(f"{self.folder}: holds pictures of another command; choose a new folder")
        else:
            self._write(path, json.dumps(wanted, indent=1, ensure_ascii=False).encode() + b"\n")
        for left in self.folder.glob(".*.part"):  # of a run that was killed
            left.unlink(missing_ok=True)

    def missing(self, share: int = 0, shares: int = 1) -> list[int]:
        """Return the indices of samples that are not there, of every `shares`-th from `share` on."""
        with os.scandir(self.folder) as entries:
            there = {entry.name for entry in entries}
        return [index for index in range(share, self.count, shares) if self.path(index).name not in there]

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.folder / f"{index:06d}.png"

    def add(self, index: int, png: bytes) -> None:
        """Write a sample."""
        self._write(self.path(index), png)

    def pack(self, out: Path) -> None:
        """Write all samples as `arr_0` `(count, height, width, 3)` uint8, with one of them in memory at a time.

        Raises:
            InvalidRequest: a sample is missing, damaged, or of another size than the first.
        """
        from patchforge.model.evaluation.npz import write_npz

        write_npz(out, self.count, self._pictures())

    def _pictures(self) -> Iterator[np.ndarray]:
        """Yield every sample, `(1, height, width, 3)` uint8."""
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        shape: tuple[int, ...] | None = None
        for index in range(self.count):
            path = self.path(index)
            try:
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
            except (FileNotFoundError, UnidentifiedImageError, OSError, SyntaxError) as error:
                raise InvalidRequest(f"{path}: cannot be read; delete it and run the command again") from error
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise InvalidRequest(f"{path}: not of the size of the first sample")
            yield pixels[None]

    def _check(self, path: Path, wanted: dict[str, Any]) -> None:
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            names = [name for name in {**made, **wanted} if made.get(name) != wanted.get(name)]
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path}: damaged; choose a new folder") from error
        if names:
            shown = f"{names[0]} was {made.get(names[0])!r:.100} and is {wanted.get(names[0])!r:.100}"
            raise InvalidRequest(f"{self.folder}: its samples were made with other settings: {shown}")

    def _write(self, path: Path, data: bytes) -> None:
        partial = self.folder / f".{path.name}.{os.getpid()}.part"
        partial.write_bytes(data)
        os.replace(partial, path)

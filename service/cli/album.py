"""The folder that `patchforge generate` writes to: pictures that never overwrite others, and a list of them."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from patchforge.service.errors import InvalidRequest

INDEX = "pictures.jsonl"
"""One line for each picture: its file, prompt, seed, and the options of the command. `--resume` reads it."""
RANDOM_SEEDS = 2**32


class Wanted(NamedTuple):
    """A picture to draw."""

    prompt: str
    seed: int


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, without blank ones.

    Raises:
        InvalidRequest: the file cannot be read, or has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InvalidRequest(f"--prompts {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--prompts {path}: is not UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidRequest(f"--prompts {path}: has no prompt")
    return prompts


class Album:
    """The pictures of one folder. The folder is made with the first picture."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """`options` are those of the command that decide how pictures look."""
        self.folder = folder
        self.options = {name: str(value) for name, value in sorted(options.items()) if value is not None}

    def choose(self, prompts: Sequence[str], seeds: Sequence[int], count: int) -> list[Wanted]:
        """The pictures to draw: `count` of each prompt from each of the seeds on, or from `count` random ones."""
        starts = seeds or [secrets.randbelow(RANDOM_SEEDS) for _ in range(count)]
        chosen = [seed + number for seed in starts for number in range(count if seeds else 1)]
        return list(dict.fromkeys(Wanted(prompt, seed) for prompt in prompts for seed in chosen))

    def resume(
        self, prompts: Sequence[str], seeds: Sequence[int], count: int
    ) -> tuple[list[Wanted], dict[Wanted, Path]]:
        """What `choose` would draw, and the pictures of it that the folder has.

        A picture counts if it was drawn from the same prompt with the same options: with the same seed, if `seeds` are
        given.
        """
        made = self._read_index()
        if seeds:
            wanted = self.choose(prompts, seeds, count)
        else:
            wanted = []
            for prompt in dict.fromkeys(prompts):
                kept = [each for each in made if each.prompt == prompt][:count]
                wanted += kept + self.choose([prompt], [], count - len(kept))
        return wanted, {each: made[each] for each in wanted if each in made}

    def add(self, wanted: Wanted, data: bytes) -> Path:
        """Write an encoded picture under a new name.

        Raises:
            InvalidRequest: the folder cannot be written to.
        """
        slug = re.sub(r"[^\w]+", "-", wanted.prompt.lower()).strip("-")[:60].strip("-") or "picture"
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._write_new(f"{slug}-{wanted.seed}", data)
            line = {"file": path.name, **wanted._asdict(), "options": self.options}
            with (self.folder / INDEX).open("a", encoding="utf-8") as index:
                index.write(json.dumps(line, ensure_ascii=False) + "\n")
        return path

    def add_grid(self, made: Mapping[Wanted, Path]) -> Path:
        """Write pictures on one sheet: a row for each prompt.

        Raises:
            InvalidRequest: a picture or the folder cannot be used.
            ModuleNotFoundError: Pillow is not installed.
        """
        from PIL import Image

        with _writing(self.folder):
            rows: dict[str, list[Path]] = {}
            for each, path in made.items():
                rows.setdefault(each.prompt, []).append(path)
            pictures = [[Image.open(path).convert("RGB") for path in row] for row in rows.values()]
            width, height = (max(each.size[side] for row in pictures for each in row) for side in (0, 1))
            sheet = Image.new("RGB", (width * max(map(len, pictures)), height * len(pictures)), "white")
            for down, row in enumerate(pictures):
                for across, picture in enumerate(row):
                    sheet.paste(picture, (across * width, down * height))
            buffer = BytesIO()
            sheet.save(buffer, "png")
            return self._write_new("grid", buffer.getvalue())

    def _write_new(self, stem: str, data: bytes) -> Path:
        """Write a PNG whose name nobody has: `stem`, or else with a number. No reader sees half of it."""
        partial = self.folder / f".{stem}.{os.getpid()}.part"
        partial.write_bytes(data)
        try:
            for number in range(1, 1_000_000):
                path = self.folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
                if _rename_new(partial, path):
                    return path
        finally:
            partial.unlink(missing_ok=True)
        raise InvalidRequest(f"{self.folder} has no name left for {stem}.png")

    def _read_index(self) -> dict[Wanted, Path]:
        """The pictures that were made with the same options and are still there."""
        try:
            lines = (self.folder / INDEX).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        made = {}
        for line in lines:
            try:
                told = json.loads(line)
                wanted, path = Wanted(told["prompt"], told["seed"]), self.folder / Path(told["file"]).name
                if told["options"] == self.options and path.is_file():
                    made[wanted] = path
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut off, or is of another program
        return made


def _rename_new(old: Path, new: Path) -> bool:
    """Give a file a name that nobody has; False if somebody has it."""
    try:
        os.link(old, new)  # a rename would overwrite
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if new.exists():
            return False
        os.replace(old, new)
    return True


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"--out {folder}: {error.strerror or error}") from error

"""Makes one small script of each command in the `.lua` files here.

The server runs a script from its first line at every call, so a script defines only what its command needs: defining
all of it would take longer than most commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

FILES = ("queue.lua", "reservations.lua", "batches.lua", "batch_files.lua", "scaling.lua")
_FUNCTION = re.compile(r"(?:local )?function (?P<name>[\w.]+)\(")
_DEFINITION = re.compile(rf"{_FUNCTION.pattern}|local (?P<constant>\w+) =")
_COMMENT = re.compile(r"^\s*--.*\n|\s+--.*$", re.MULTILINE)
_WORD = re.compile(r"commands\.\w+|(?<!\w\.)\b\w+")
_TEXT = re.compile(r"'[^']*'")


def build_scripts(constants: Mapping[str, str | int | float]) -> dict[str, str]:
    """Returns command → the text of its script, which expects the command's name and arguments in ARGV."""
    scripts = {}
    for command, (text, words) in _bodies().items():
        used = {word: value for word, value in constants.items() if word in words}
        header = " ".join(f"local {word} = {json.dumps(value)}" for word, value in used.items())
        scripts[command] = f"{header}\n{text}"
    return scripts


@cache
def _bodies() -> dict[str, tuple[str, frozenset[str]]]:
    """Returns command → the text of its script without the constants, and all words in it."""
    beginning, definitions, end = _parts()
    bodies = {}
    for name in definitions:
        if name.startswith("commands."):
            needed = _in_order([*_words(end), name], definitions)
            parts = [beginning, *(definitions[each] for each in needed), end]
            text = "\n".join(parts).replace("COMMAND", name)
            bodies[name.removeprefix("commands.")] = text, frozenset(_words(text))
    return bodies


def _parts() -> tuple[str, dict[str, str], str]:
    """Returns what every script begins with, functions and constants by name in order, and what every script ends with.

    Each definition begins at the left margin. The beginning is what stands before the first function.
    """
    blocks = _blocks("".join(map(_read, FILES)))
    first = next(place for place, block in enumerate(blocks) if _FUNCTION.match(block))
    definitions = {}
    for block in blocks[first:]:
        found = _DEFINITION.match(block)
        assert found, block
        definitions[found["name"] or found["constant"]] = block
    return "\n".join(blocks[:first]), definitions, _read("dispatch.lua")


def _read(name: str) -> str:
    """Returns the text of a file without its comments."""
    return _COMMENT.sub("", files(__package__).joinpath(name).read_text("utf-8"))


def _blocks(text: str) -> list[str]:
    """Splits at the lines that begin at the left margin, except those that close a block."""
    return [block.strip() for block in re.split(r"\n(?=\S)(?!end\b|\}|\))", text) if block.strip()]


def _words(text: str) -> list[str]:
    """Returns the names in a text, but not those of fields and in strings."""
    return _WORD.findall(_TEXT.sub("''", text))


def _in_order(names: Sequence[str], definitions: Mapping[str, str]) -> list[str]:
    """Returns those definitions, and all that they use, each after what it uses: so the files may have any order."""
    found: dict[str, None] = {}
    begun = set()

    def add(name: str) -> None:
        if name in definitions and name not in begun:
            begun.add(name)
            for word in _words(definitions[name]):
                add(word)
            found[name] = None

    for name in names:
        add(name)
    return list(found)

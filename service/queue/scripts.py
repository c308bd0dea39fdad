"""Makes one small script of each command in `queue.lua`.

The server runs a script from its first line at every call, so a script defines only what its command needs: defining
all of it would take longer than most commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

_DEFINITION = re.compile(r"(?:local )?function (?P<name>[\w.]+)\(")
_COMMENT = re.compile(r"^\s*--.*\n|\s+--.*$", re.MULTILINE)
_WORD = re.compile(r"commands\.\w+|\w+")


def build_scripts(constants: Mapping[str, str | int | float]) -> dict[str, str]:
    """Returns command → the text of its script, which expects the command's name and arguments in ARGV."""
    beginning, definitions, end = _parts()
    scripts = {}
    for name in definitions:
        if name.startswith("commands."):
            needed = _needs(end, definitions) | _needs(definitions[name], definitions) | {name}
            body = [beginning, *(text for each, text in definitions.items() if each in needed), end]
            text = "\n".join(body).replace("COMMAND", name)
            used = {word: value for word, value in constants.items() if re.search(rf"\b{word}\b", text)}
            header = " ".join(f"local {word} = {json.dumps(value)}" for word, value in used.items())
            scripts[name.removeprefix("commands.")] = f"{header}\n{text}"
    return scripts


@cache
def _parts() -> tuple[str, dict[str, str], str]:
    """Returns what every script begins with, the functions by name in their order, and what every script ends with."""
    text = _COMMENT.sub("", files(__package__).joinpath("queue.lua").read_text("utf-8"))
    blocks = [block.strip() for block in re.split(r"\n(?=\S)(?!end\b|\}|\))", text) if block.strip()]
    definitions = {found["name"]: block for block in blocks if (found := _DEFINITION.match(block))}
    places = [place for place, block in enumerate(blocks) if _DEFINITION.match(block)]
    return "\n".join(blocks[: places[0]]), definitions, "\n".join(blocks[places[-1] + 1 :])


def _needs(text: str, definitions: Mapping[str, str]) -> set[str]:
    """Returns the functions that a text calls, directly or not."""
    needed: set[str] = set()
    todo = {word for word in _WORD.findall(text) if word in definitions}
    while todo:
        name = todo.pop()
        needed.add(name)
        todo |= {word for word in _WORD.findall(definitions[name]) if word in definitions} - needed
    return needed

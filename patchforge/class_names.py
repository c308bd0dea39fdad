"""Find the class that a person means. Loads nothing: the gateway uses it as well as the pipeline.

A class has one label, such as `tench, Tinca tinca`: its names, separated by commas, the usual one first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache

NEAREST = 3
"""Labels that an error names."""
MOST_COMPARED = 10_000
"""Names. Finding those spelled alike among more would take seconds."""


class NoSuchClass(ValueError):
    """No class, or more than one, has the name. The message tells the labels that may have been meant."""


def match_class(typed: str, labels: Sequence[str]) -> str:
    """Return the label that `typed` means. Case, hyphens, underscores and spaces at the ends do not matter.

    These are tried in order, and the first that fits any label decides: the label; all of a label's names, the usual
    name, any name; the beginning of a name.

    >>> match_class("tinca tinca", ["tench, Tinca tinca", "goldfish"])
    'tench, Tinca tinca'
    >>> match_class("Gold", ["tench, Tinca tinca", "goldfish"])
    'goldfish'

    Raises:
        NoSuchClass: none fits, or several do.
    """
    index = _index(tuple(labels))
    found = index.find(typed)
    if len(found) == 1:
        return found[0]
    if found:
        raise NoSuchClass(f"means more than one class{_list(': ', found)}")
    if len(index.all) > MOST_COMPARED:
        raise NoSuchClass("no such class")
    near = [label for name in get_close_matches(_normalise(typed), index.all, NEAREST) for label in index.all[name]]
    raise NoSuchClass(f"no such class{_list('; the nearest: ', near[:NEAREST])}")


def knows_class(typed: str | None, labels: Sequence[str]) -> bool:
    """Tell whether `typed` means one of the classes, and only one."""
    return typed is not None and len(_index(tuple(labels)).find(typed)) == 1


class _Index:
    """Labels by their normalised names."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = frozenset(labels)
        self.whole: dict[str, list[str]] = {}
        self.usual: dict[str, list[str]] = {}
        self.all: dict[str, list[str]] = {}
        for label in labels:
            names = list(dict.fromkeys(map(_normalise, label.split(","))))
            self.whole.setdefault(_normalise(label), []).append(label)
            self.usual.setdefault(names[0], []).append(label)
            for name in names:
                self.all.setdefault(name, []).append(label)

    def find(self, typed: str) -> list[str]:
        """Return the labels that `typed` may mean."""
        if typed in self.labels:
            return [typed]
        wanted = _normalise(typed)
        for names in (self.whole, self.usual, self.all):
            if wanted in names:
                return list(dict.fromkeys(names[wanted]))
        begun = [label for name, labels in self.all.items() if wanted and name.startswith(wanted) for label in labels]
        return list(dict.fromkeys(begun))


_index = lru_cache(maxsize=32)(_Index)


def _normalise(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _list(before: str, labels: list[str]) -> str:
    shown = [repr(label) for label in dict.fromkeys(labels)]
    more = f" and {len(shown) - NEAREST} more" if len(shown) > NEAREST else ""
    return f"{before}{', '.join(shown[:NEAREST])}{more}" if shown else ""

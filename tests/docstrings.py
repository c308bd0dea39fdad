"""Runs the examples in docstrings."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest


def run_examples(documented: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **replaced: str) -> None:
    """Those of a class and its methods, in an empty folder.

    `replaced`: values of `http`, the address of a server to use instead of the one that examples name.
    """
    monkeypatch.chdir(folder)
    examined = 0
    for test in doctest.DocTestFinder(recurse=True).find(documented, documented.__name__):
        for example in test.examples:
            example.source = example.source.replace("http://127.0.0.1:8000", replaced.get("http", ""))
        examined += len(test.examples)
        said: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert result.failed == 0, "".join(said)
    assert examined, f"{documented.__name__} has no examples"

"""docs/faults.md names every row that has a test, and nothing that an operator sees without a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "faults.md").read_text("utf-8")
LINES = [line.split("|") for line in TEXT.splitlines() if re.match(r"\| \d", line)]
ROWS = {int(cells[1]): cells[4] for cells in LINES}

Nodes = dict[str, list[ast.AST]]


@dataclass(frozen=True)
class Module:
    """What names in a file's functions can refer to."""

    own: Nodes
    imported: set[str]

    @classmethod
    def of(cls, text: str) -> Module:
        tree = ast.parse(text)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        return cls(defined(tree), {alias.name for node in imports for alias in node.names})


def defined(tree: ast.AST) -> Nodes:
    """Returns functions, methods and assigned values of a module or class, by name."""
    found: Nodes = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ClassDef):
            for name, inner in defined(node).items():
                found.setdefault(name, []).extend(inner)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


FILES = {path: Module.of(path.read_text("utf-8")) for path in HERE.glob("*.py")}
KITS = [module for path, module in FILES.items() if not path.name.startswith("test_")]


def row_tests(row: int) -> list[tuple[ast.AST, Module]]:
    """Returns each test of a row, and its place."""
    return [
        (node, module)
        for module in FILES.values()
        for name, nodes in module.own.items()
        if name.startswith(f"test_row_{row:02}_")
        for node in nodes
    ]


def texts(node: ast.AST, module: Module, seen: set[ast.AST]) -> Iterator[str]:
    """Returns all strings in a test and, without docstrings, in everything of its file or the kits that it uses."""
    if node in seen:
        return
    seen.add(node)
    remarks = {each.value for each in ast.walk(node) if isinstance(each, ast.Expr)}
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and each not in remarks:
            yield each.value
        for home, used in meant(each, module):
            yield from texts(used, home, seen)


def meant(node: ast.AST, module: Module) -> Iterator[tuple[Module, ast.AST]]:
    """What a name, or a method of whatever class it may be, stands for."""
    match node:
        case ast.Name(id=name) if name in module.own:
            homes = [module]
        case ast.Name(id=name) if name in module.imported:
            homes = KITS
        case ast.Attribute(attr=name):
            homes = KITS
        case _:
            return
    for home in homes:
        for used in home.own.get(name, []):
            yield home, used


def test_every_row_has_its_tests() -> None:
    assert sorted(ROWS) == list(range(1, 35))
    assert all(row_tests(row) for row in ROWS)
    names = {name for module in FILES.values() for name in module.own if name.startswith("test_row_")}
    assert {int(name.split("_")[2]) for name in names} == set(ROWS)


@pytest.mark.parametrize("row", sorted(ROWS))
def test_what_an_operator_sees_is_looked_at(row: int) -> None:
    looked_for = {text for test, module in row_tests(row) for text in texts(test, module, set())}
    seen = re.findall(r"`([^`]+)`", ROWS[row])
    assert seen
    for name in seen:
        assert any(text.startswith(name) for text in looked_for), name


def test_what_is_elsewhere_does_not_count() -> None:
    module = Module.of(EXAMPLE)
    [test] = module.own["test"]
    assert set(texts(test, module, set())) == {"looked at", "so is this"}


EXAMPLE = """
SOUGHT = "looked at"
def other():
    wait_for("not by this test")
def helper():
    wait_for("so is this")
def test():
    "as the docstring says"
    helper()
    wait_for(SOUGHT)
"""

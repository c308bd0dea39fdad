"""Imports point one way: the architecture, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TENSORS = {"torch", "safetensors", "diffusers", "transformers", "numpy"}


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Modules a file imports: at its top level, or ``everywhere`` in it, type-checking blocks included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def file_of(module: str) -> Path | None:
    for path in (ROOT / f"{module.replace('.', '/')}.py", ROOT / module.replace(".", "/") / "__init__.py"):
        if path.exists():
            return path
    return None


def reached(module: str) -> set[str]:
    """Everything importing ``module`` imports, as far as it is ours."""
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        current = ahead.pop()
        if current in seen:
            continue
        seen.add(current)
        path = file_of(current)
        if path is not None:
            ahead += imported(path, everywhere=False)
    return seen


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


MODEL = sorted((ROOT / "model").rglob("*.py"))
GATEWAY = sorted((ROOT / "service" / "gateway").rglob("*.py"))


@pytest.mark.parametrize("path", MODEL, ids=lambda path: str(path.relative_to(ROOT)))
def test_model_never_imports_service(path: Path) -> None:
    assert "service" not in packages(imported(path, everywhere=True))


@pytest.mark.parametrize("path", GATEWAY, ids=lambda path: str(path.relative_to(ROOT)))
def test_gateway_never_imports_model_or_tensors(path: Path) -> None:
    assert not packages(imported(path, everywhere=True)) & ({"model"} | TENSORS)


@pytest.mark.parametrize(
    "module", ["service.gateway.app", "service.supervisor", "service.cli", "service.queue", "service.online"]
)
def test_nothing_the_gateway_or_a_client_loads_brings_tensors(module: str) -> None:
    found = reached(module)
    assert file_of(module) is not None
    assert len(found) > 10
    assert not packages(found) & ({"model"} | TENSORS)


def test_the_scheduler_touches_no_tensor() -> None:
    assert not packages(imported(ROOT / "service/worker/scheduler.py", everywhere=True)) & ({"model"} | TENSORS)


@pytest.mark.parametrize("leaf", ["errors", "messages", "sampler_options", "schemas", "events", "settings", "keys"])
def test_leaves_import_no_other_part_of_the_service(leaf: str) -> None:
    ours = {m for m in imported(ROOT / f"service/{leaf}.py", everywhere=True) if m.startswith("service.")}
    leaves = ("service.errors", "service.messages", "service.sampler_options", "service.schemas")
    assert {m for m in ours if not m.startswith(leaves)} == set()

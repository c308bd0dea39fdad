"""Imports point one way: the architecture, enforced. docs/architecture.md draws it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("model", "service", "patchforge", "tests")
TENSORS = {"torch", "safetensors", "diffusers", "transformers", "numpy"}
ROOMS = ("messages", "results", "queue", "client", "gateway", "worker", "bench", "soak", "cli")
"""Rooms of `service/`. Each may import earlier ones and the files at the root of `service/`, but no later ones."""
APART = {"queue": {"client"}, "gateway": {"client"}, "worker": {"client", "gateway"}}
"""Rooms that must not import each other, although the order would allow it."""
WITHOUT_TENSORS = ("messages", "results", "queue", "client", "gateway")


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Returns the modules that a file imports: at its top level, or `everywhere`, including type-checking blocks."""
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
    """Returns everything that importing `module` imports, including parent packages, as far as it is ours."""
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        current = ahead.pop()
        if current in seen:
            continue
        seen.add(current)
        parent = current.rpartition(".")[0]
        if parent:
            ahead.append(parent)
        path = file_of(current)
        if path is not None:
            ahead += imported(path, everywhere=False)
    return seen


def loads_tensors(modules: set[str]) -> bool:
    return any(m.partition(".")[0] in TENSORS or f"{m}.".startswith("patchforge.model.") for m in modules)


def files_of(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for d in OURS for p in files_of(d)], ids=named)
def test_everything_of_ours_is_imported_by_its_full_name(path: Path) -> None:
    """Otherwise a user's own `model.py` or `service/` could be imported instead."""
    if "pb" not in path.parts:
        assert not {m.partition(".")[0] for m in imported(path, everywhere=True)} & {"model", "service", "proto"}


@pytest.mark.parametrize("path", files_of("model"), ids=named)
def test_model_never_imports_service(path: Path) -> None:
    assert not [m for m in imported(path, everywhere=True) if m.startswith("patchforge.service")]


@pytest.mark.parametrize("path", [p for room in WITHOUT_TENSORS for p in files_of(f"service/{room}")], ids=named)
def test_no_tensors_in_messages_queue_client_and_gateway(path: Path) -> None:
    assert not loads_tensors(imported(path, everywhere=True))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards(room: str) -> None:
    forbidden = {*ROOMS[ROOMS.index(room) + 1 :], *APART.get(room, ())}
    for path in files_of(f"service/{room}"):
        rooms = {m.split(".")[2] for m in imported(path, everywhere=True) if m.startswith("patchforge.service.")}
        assert not rooms & forbidden, path


@pytest.mark.parametrize("path", sorted((ROOT / "service").glob("*.py")), ids=named)
def test_what_all_rooms_share_imports_no_room_but_messages(path: Path) -> None:
    if path.stem == "supervisor":  # it starts them
        return
    rooms = {m.split(".")[2] for m in imported(path, everywhere=True) if m.startswith("patchforge.service.")}
    assert not rooms & set(ROOMS[1:])


@pytest.mark.parametrize(
    "module",
    ["patchforge", "patchforge.service.cli.main", "patchforge.service.gateway.app", "patchforge.service.supervisor"],
)
def test_nothing_the_gateway_the_command_line_or_a_client_loads_brings_tensors(module: str) -> None:
    found = reached(module)
    assert file_of(module) is not None
    assert len(found) > 5
    assert not loads_tensors(found)


def test_the_scheduler_touches_no_tensor() -> None:
    assert not loads_tensors(imported(ROOT / "service/worker/scheduler.py", everywhere=True))

"""Whatever a thread raises reaches its awaiter, and asyncio code starts threads in no other way."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

from patchforge.service.threads import in_thread
from tests.patience import PATIENCE

SERVICE = Path(__file__).parents[2] / "service"


async def test_results_and_errors_come_through() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_stop_iteration_is_an_ordinary_error() -> None:
    async with asyncio.timeout(PATIENCE):  # it used to wait for ever
        with pytest.raises(RuntimeError, match="next raised StopIteration") as caught:
            await in_thread(next, iter(()))
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.parametrize("path", sorted(SERVICE.rglob("*.py")), ids=lambda path: str(path.relative_to(SERVICE)))
def test_no_other_code_uses_to_thread(path: Path) -> None:
    if path == SERVICE / "threads.py":
        return
    names = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
    assert not names & {"to_thread", "run_in_executor"}

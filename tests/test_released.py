"""The wheels in tests/released contain what their commits do, and nothing heavy."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests import released
from tests.processes import ROOT

MOST_BYTES = 700_000


@pytest.mark.parametrize("wheel", released.WHEELS.values(), ids=lambda path: path.name)
def test_a_wheel_is_its_commit(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES
    commit = re.findall(r"\+(\w+)-", wheel.name)[0]
    if not shutil.which("git") or not known(commit):
        pytest.skip(f"Git's history does not have {commit} here")
    with zipfile.ZipFile(wheel) as archive:
        ours = [name for name in archive.namelist() if name.endswith((".py", ".lua")) and "/pb/" not in name]
        assert len(ours) > 100
        for name in ours:
            assert archive.read(name) == committed(commit, name), name


def known(commit: str) -> bool:
    return not subprocess.run(["git", "cat-file", "-e", commit], cwd=ROOT, stderr=subprocess.DEVNULL).returncode


def committed(commit: str, name: str) -> bytes:
    """In a checkout, patchforge/model and patchforge/service are links."""
    place = re.sub(r"^patchforge/(?=(model|service)/)", "", name)
    return subprocess.run(["git", "show", f"{commit}:{place}"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout

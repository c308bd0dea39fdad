"""Every command in README.md and docs/ exists: tests/e2e runs it unchanged, or it is parsed here."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from patchforge.service.gateway.inference.protocol import INPUTS, OUTPUTS
from patchforge.service.messages.schemas import GenerationRequest
from tests.doc_snippets import (
    EXCUSED,
    ROOT,
    Snippet,
    brings_its_server,
    check_make,
    check_patchforge,
    excused,
    is_run,
    mentions,
    parse,
    program,
    snippets,
)

ALL = snippets()
PARSED = [snippet for snippet in ALL if not is_run(snippet) and not brings_its_server(snippet)]


def test_all_documents_have_their_snippets_counted() -> None:
    assert {snippet.language for snippet in ALL} == {"sh", "python"}
    assert {"README.md", "api.md", "clients.md", "operation.md"} <= {each.document.name for each in ALL if is_run(each)}


@pytest.mark.parametrize("snippet", PARSED, ids=str)
def test_what_is_not_run_is_parsed(snippet: Snippet) -> None:
    """A snippet is run as a whole. If only some commands can be run, split it, or excuse all of it."""
    for command in snippet.commands:
        assert excused(command), f"{shlex.join(command)} is neither run nor excused"
        parse(command)


@pytest.mark.parametrize(("document", "text"), mentions(), ids=lambda value: getattr(value, "name", value))
def test_a_command_named_in_passing_exists(document: Path, text: str) -> None:
    words = shlex.split(text)
    if words[0] == "make":
        check_make(words)
    else:
        check_patchforge(words, whole=False)


@pytest.mark.parametrize("name", [*GenerationRequest.model_fields, *INPUTS, *OUTPUTS])
def test_the_api_s_page_names_every_field_and_tensor(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "api.md").read_text("utf-8")


@pytest.mark.parametrize("start", EXCUSED)
def test_no_excuse_is_left_over(start: str) -> None:
    words = start.split()
    assert any(program(command)[: len(words)] == words for snippet in ALL for command in snippet.commands)


@pytest.mark.parametrize(
    "text",
    [
        "patchforge train model text --epochs 3 --out runs/mine",
        "patchforge train model text --minutes many --out runs/mine",
        "patchforge train model",
        "patchforge bench speed",
        "patchforge train",
        "PATCHFORGE_BUNDLES=runs/mine patchforge serve",
        "make sandwich",
        "docker compose up --scales worker=3",
        "docker compose up --scale labourer=3",
        "docker build --target gatehouse -t patchforge-gateway:0.1.0 .",
        "kubectl apply -k deploy/kubernetes/nowhere",
        "kubectl apply -f deploy/kubernetes/nowhere.yml",
        "pip install --require-hash -r requirements.lock",
        "pip install torch==1.0",
        "export PATCHFORGE_TLS_CERTIFICATE=cert.pem",
        "aws s3api put-bucket-lifecycle-configuration --bucket b --lifecycle-configuration rule.json",
    ],
)
def test_a_wrong_command_would_show(text: str) -> None:
    with pytest.raises(AssertionError):
        parse(shlex.split(text))

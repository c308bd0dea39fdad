"""`patchforge generate --server`, as its own process, in and out of a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from pathlib import Path

import pytest

from service.api_keys import entry
from service.embedded import free_port
from service.gateway.app import Gateway
from service.queue import JobQueue
from service.settings import Settings
from tests.service.gateway.conftest import gateway, settings, url, worker
from tests.service.gateway.harness import ScriptedWorker, ended, png, running
from tests.service.gateway.pictures import encoded, gradient, mask

__all__ = ["gateway", "settings", "url", "worker"]

ROOT = Path(__file__).parents[2]
PATIENCE = 90
# A shell that runs these tests in the background has them ignore Ctrl-C, and what they start would too. A preexec_fn
# could mend that as well, but it has Python fork, and gRPC's threads, which serve this very process, abort in a fork.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from service.cli import app
app()
"""


async def start(
    folder: Path, *words: str, stdout: int = -1, stderr: int = -1, **variables: str
) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM_PROGRAM")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "100"} | variables
    command = [sys.executable, "-c", PROGRAM, "generate", *words]
    return await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment, stdout=stdout, stderr=stderr)


async def generate(folder: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a run to its end, outside a terminal."""
    process = await start(folder, *words, **variables)
    output, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    return process.returncode or 0, output.decode(), errors.decode()


async def test_pictures_from_a_server(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    code, output, errors = await generate(
        tmp_path, "red apple", "pear!", "--server", url, "--seed", "7", "--out", "made", "--steps", "5"
    )
    assert code == 0, errors
    assert output.splitlines() == [
        "made/00-red-apple-7.png  saved 33% of the dense run's patch evaluations",
        "made/01-pear-7.png  saved 33% of the dense run's patch evaluations",
    ]
    assert (tmp_path / "made" / "01-pear-7.png").read_bytes() == png(7)


async def test_a_class_of_a_named_model(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    code, output, _ = await generate(tmp_path, "grinning face", "--server", url, "--model", "tiny-class")
    assert code == 0
    assert "pictures/00-grinning-face-0.png" in output


async def test_what_only_a_server_can_do(url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(gradient()))
    (tmp_path / "mask.png").write_bytes(encoded(mask()))
    words = ["--quality", "draft", "--size", "96x64", "--image", "photo.png", "--mask", "mask.png", "--strength", "0.8"]
    code, _, errors = await generate(tmp_path, "pear", *words, "--server", url)
    assert code == 0, errors
    job = await queue.get(await worker.next_job())
    assert (job.request.steps, job.request.width, job.request.height, job.request.strength) == (6, 96, 64, 0.8)
    assert (await queue.source(job.id)).mask is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny-text"], "--model goes with --server"),
        (["--size", "96x64"], "--size goes with --server"),
        ([], "go to the repository, or give --bundle or --server"),
        (["--server", "localhost:8000"], "begins with http:// or https://"),
    ],
)
async def test_what_is_missing_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    code, _, errors = await generate(tmp_path, "pear", *words)
    assert code == 1
    assert message in errors


async def test_nothing_of_it_loads_torch(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    code = f"""
import sys
from service.cli import app
app(["generate", "pear", "--server", "{url}"], standalone_mode=False)
heavy = {{"torch", "model", "numpy", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    assert (tmp_path / "pictures" / "00-pear-0.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unicorn", "--model", "tiny-class"], "no such class"),
        (["pear", "--model", "absent"], "the server has tiny-class, tiny-text"),
        (["pear", "--sampler", "warp"], "sampler: expected one of"),
        (["pear", "--bundle", "model/bundles/emoji-text"], "--bundle draws without a server"),
        (["pear", "fail"], "the picture is too big"),
        (["pear", "--size", "large"], "--size is WIDTHxHEIGHT"),
        (["pear", "--size", "9x9"], "width: Input should be greater than or equal to 16"),
        (["pear", "--quality", "best"], "quality: "),
        (["pear", "--strength", "0.5"], "strength: is of use only with image"),
    ],
)
async def test_errors_are_one_clear_line(
    url: str, worker: ScriptedWorker, tmp_path: Path, words: list[str], message: str
) -> None:
    code, output, errors = await generate(tmp_path, *words, "--server", url)
    assert code == 1, errors
    assert output == ""
    [line] = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "pictures").exists()


async def test_nobody_there(tmp_path: Path) -> None:
    code, _, errors = await generate(tmp_path, "pear", "--server", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert errors.startswith("error: no answer from http://127.0.0.1:")


async def test_the_key_comes_from_the_environment(
    settings: Settings, queue: JobQueue, worker: ScriptedWorker, tmp_path: Path
) -> None:
    locked = settings.model_copy(update={"api_keys": [entry("tester", "s3cret")]})
    async with running(Gateway(locked, queue)) as gateway:
        server = ["--server", f"http://127.0.0.1:{gateway.http_port}"]
        code, _, errors = await generate(tmp_path, "pear", *server)
        assert (code, "API key" in errors) == (1, True)
        code, _, errors = await generate(tmp_path, "pear", *server, PATCHFORGE_API_KEY="s3cret")
        assert code == 0, errors


async def test_ctrl_c_cancels_on_the_server(url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path) -> None:
    worker.curtain.clear()
    process = await start(tmp_path, "pear", "apple", "--server", url)
    jobs = [await worker.next_job(), await worker.next_job()]
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 130
    assert errors.decode().strip().endswith("cancelled")
    assert [await ended(queue, job) for job in jobs] == ["cancelled"] * 2
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("term", "mark"),
    [("xterm-kitty", "\x1b_Gf=100,a=T"), ("xterm-256color", "▀"), ("dumb", None), ("xterm-kitty", None)],
)
async def test_a_terminal_shows_the_picture_while_it_is_made_and_after(
    url: str, worker: ScriptedWorker, tmp_path: Path, term: str, mark: str | None
) -> None:
    quiet = term == "xterm-kitty" and mark is None
    worker.curtain.clear()
    leader, follower = pty.openpty()
    words = ["pear", "--server", url, *(["--no-show"] if quiet else [])]
    process = await start(tmp_path, *words, stdout=follower, stderr=follower, TERM=term)
    os.close(follower)
    shown = bytearray()
    loop = asyncio.get_running_loop()
    seen, closed = asyncio.Event(), asyncio.Event()
    if term == "dumb":
        seen.set()  # nothing moves there

    def read() -> None:
        try:
            shown.extend(os.read(leader, 65536))
        except OSError:  # the other end is closed
            loop.remove_reader(leader)
            closed.set()
        if "▀".encode() in shown or (quiet and b"finished" in shown):
            seen.set()

    loop.add_reader(leader, read)
    try:
        await worker.next_job()
        await asyncio.wait_for(seen.wait(), PATIENCE)  # a preview, before the picture is there
        worker.curtain.set()
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        await asyncio.wait_for(closed.wait(), PATIENCE)
    finally:
        loop.remove_reader(leader)
        os.close(leader)
    text = shown.decode(errors="replace")
    assert "saved 33%" in text
    if mark is None:
        assert "▀" not in text
        assert "\x1b_G" not in text
    else:
        assert mark in text

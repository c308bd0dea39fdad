"""`patchforge generate --server`, as its own process, in and out of a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
from pathlib import Path

import pytest

from patchforge.service.embedded import free_port
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.auth import make_entry
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.processes import PYTHON, Process, launch, run
from tests.service.gateway.conftest import gateway, settings, url, worker
from tests.service.gateway.harness import ScriptedWorker, ended, png, running
from tests.service.gateway.pictures import decoded, encoded, gradient, mask

__all__ = ["gateway", "settings", "url", "worker"]

# If a shell runs these tests in the background, they and their children ignore Ctrl-C. A preexec_fn could change that
# too, but then Python forks, and the gRPC threads that serve this process abort in a fork.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from patchforge.service.cli.main import app
app()
"""


COMMAND = *PYTHON, PROGRAM, "generate"
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": "", "TERM_PROGRAM": ""}


async def generate(folder: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a run to its end, outside a terminal."""
    ran = await asyncio.to_thread(run, *COMMAND, *words, cwd=folder, status=None, **TERMINAL | variables)
    return ran.returncode, ran.stdout, ran.stderr


async def test_pictures_from_a_server(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    code, output, errors = await generate(
        tmp_path, "red apple", "pear!", "--server", url, "--seed", "7", "--out", "made", "--steps", "5"
    )
    assert code == 0, errors
    assert output.splitlines() == [
        "made/red-apple-7.png  saved 33% of the dense run's patch evaluations",
        "made/pear-7.png  saved 33% of the dense run's patch evaluations",
    ]
    assert (tmp_path / "made" / "pear-7.png").read_bytes() == png(7)


async def test_a_class_of_a_named_model(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    words = "--server", url, "--model", "tiny-class", "--seed", "0"
    code, output, _ = await generate(tmp_path, "grinning face", *words)
    assert code == 0
    assert "pictures/grinning-face-0.png" in output


async def test_options_that_need_a_server(url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(gradient()))
    (tmp_path / "mask.png").write_bytes(encoded(mask()))
    words = ["--quality", "draft", "--size", "96x64", "--image", "photo.png", "--mask", "mask.png", "--strength", "0.8"]
    words += ["--fit", "cover", "--negative-prompt", "apple"]
    code, _, errors = await generate(tmp_path, "pear", *words, "--server", url)
    assert code == 0, errors
    job = await queue.get(await worker.next_job())
    assert (job.request.steps, job.request.width, job.request.height, job.request.strength) == (6, 96, 64, 0.8)
    assert (job.request.fit, job.request.negative_prompt) == ("cover", "apple")
    assert (await queue.source(job.id)).mask is not None


async def test_a_bundle_that_is_not_there(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    code, _, errors = await generate(tmp_path, "pear", "--server", url, "--model-digest", "0" * 64)
    assert code == 1
    assert "no worker serves tiny-text with this digest" in errors
    assert worker.played == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny-text"], "--model requires --server"),
        (["--fit", "cover"], "--fit requires --server"),
        (["--model-digest", "0" * 64], "--model-digest requires --server"),
        (["--server", "localhost:8000"], "begins with http:// or https://"),
    ],
)
async def test_options_that_do_not_fit_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    code, _, errors = await generate(tmp_path, "pear", *words)
    assert code == 1
    assert message in errors


async def test_drawing_on_a_server_does_not_load_torch(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    code = f"""
import sys
from patchforge.service.cli.main import app
app(["generate", "pear", "--server", "{url}", "--seed", "0"], standalone_mode=False)
heavy = {{"torch", "patchforge.model", "numpy", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    await asyncio.to_thread(run, *PYTHON, code, cwd=tmp_path)
    assert (tmp_path / "pictures" / "pear-0.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unicorn", "--model", "tiny-class"], "no such class"),
        (["pear", "--model", "absent"], "the server has tiny-class, tiny-text"),
        (["pear", "--sampler", "warp"], "sampler: must be one of"),
        (["pear", "--bundle", "emoji-text"], "--bundle and --server cannot be used together"),
        (["fail"], "the picture is too big"),
        (["pear", "--size", "large"], "--size must be WIDTHxHEIGHT"),
        (["pear", "--size", "9x9"], "width: Input should be greater than or equal to 16"),
        (["pear", "--quality", "best"], "quality: "),
        (["pear", "--strength", "0.5"], "strength: requires image"),
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


async def test_a_resumed_run_draws_what_is_missing(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffpear\r\n\r\nÄpfel 🍎\n".encode())
    words = ["--prompts", "prompts.txt", "--server", url, "--seed", "7", "--seed", "20", "-n", "2", "--out", "made"]
    code, output, errors = await generate(tmp_path, *words)
    assert code == 0, errors
    names = [f"made/{slug}-{seed}.png" for slug in ("pear", "äpfel") for seed in (7, 8, 20, 21)]
    assert [line.split("  ")[0] for line in output.splitlines()] == names
    (tmp_path / "made" / "pear-8.png").unlink()
    with (tmp_path / "made" / "pictures.jsonl").open("a") as index:
        index.write('{"file": "cut off')
    code, output, errors = await generate(tmp_path, *words, "--resume", "--grid")
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0].startswith("made/pear-8.png  saved 33%")
    assert lines[1:8] == [f"{name}  is there already" for name in names if name != names[1]]
    assert lines[8] == "made/grid.png  shows 8 pictures"
    sheet = decoded((tmp_path / "made" / "grid.png").read_bytes())
    assert sheet.size == (4, 2), "a row for each prompt, of pictures of one pixel"
    assert [sheet.getpixel((column, 0))[0] for column in range(4)] == [7, 8, 20, 21]
    assert worker.played == 9


async def test_what_was_drawn_before_a_failure_is_kept(
    url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path
) -> None:
    """Of more pictures than are in flight together."""
    (tmp_path / "prompts.txt").write_text("pear\n" * 3 + "fail\n")
    words = ["--prompts", "prompts.txt", "--server", url, "--seed", "7", "-n", "9"]
    code, output, errors = await generate(tmp_path, *words)
    assert code == 1
    assert errors.strip() == "error: the picture is too big"
    made = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert made
    assert {f"pictures/{name}" for name in made} == {line.split("  ")[0] for line in output.splitlines()}


async def test_nothing_is_overwritten_and_seeds_differ(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    for _ in range(2):
        code, _, errors = await generate(tmp_path, "pear", "--server", url, "--seed", "7")
        assert code == 0, errors
        code, _, errors = await generate(tmp_path, "pear", "--server", url, "-n", "2")
        assert code == 0, errors
    names = {path.name for path in (tmp_path / "pictures").iterdir()} - {"pictures.jsonl"}
    assert {"pear-7.png", "pear-7-2.png"} < names
    assert len(names) == 6


async def test_a_resumed_run_without_seeds_counts(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    words = ["pear", "--server", url, "--resume"]
    for count, steps, played in (("1", "5", 1), ("3", "5", 3), ("3", "5", 3), ("2", "5", 3), ("2", "6", 5)):
        code, _, errors = await generate(tmp_path, *words, "-n", count, "--steps", steps)
        assert code == 0, errors
        assert worker.played == played


async def test_metadata_can_be_declined(url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path) -> None:
    for words, wanted in (([], True), (["--no-metadata"], False)):
        code, _, errors = await generate(tmp_path, "pear", *words, "--server", url)
        assert code == 0, errors
        assert (await queue.get(await worker.next_job())).request.metadata is wanted


async def test_no_server(tmp_path: Path) -> None:
    code, _, errors = await generate(tmp_path, "pear", "--server", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert errors.startswith("error: no answer from http://127.0.0.1:")


async def test_the_key_comes_from_the_environment(
    settings: Settings, queue: JobQueue, worker: ScriptedWorker, tmp_path: Path
) -> None:
    locked = settings.model_copy(update={"api_keys": [make_entry("tester", "s3cret")]})
    async with running(Gateway(locked, queue)) as gateway:
        server = ["--server", f"http://127.0.0.1:{gateway.http_port}"]
        code, _, errors = await generate(tmp_path, "pear", *server)
        assert (code, "API key" in errors) == (1, True)
        code, _, errors = await generate(tmp_path, "pear", *server, PATCHFORGE_API_KEY="s3cret")
        assert code == 0, errors


async def test_ctrl_c_cancels_on_the_server(url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path) -> None:
    worker.curtain.clear()
    process = Process("generate", *COMMAND, "pear", "apple", "--server", url, cwd=tmp_path)
    jobs = [await worker.next_job(), await worker.next_job()]
    process.send(signal.SIGINT)
    assert await asyncio.to_thread(process.wait) == 130
    assert process.stray[-1] == "cancelled"
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
    process = launch(*COMMAND, *words, cwd=tmp_path, stdout=follower, stderr=follower, **TERMINAL | {"TERM": term})
    os.close(follower)
    shown = bytearray()
    loop = asyncio.get_running_loop()
    seen, closed = asyncio.Event(), asyncio.Event()
    if term == "dumb":
        seen.set()  # it shows no progress

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
        assert await asyncio.to_thread(process.wait, PATIENCE) == 0
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

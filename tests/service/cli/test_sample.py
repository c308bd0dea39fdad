"""`patchforge sample`: every sample by its index, wherever it is drawn and however often the run is stopped."""

from __future__ import annotations

import asyncio
import signal
import time
import tracemalloc
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchforge.model.pipeline import Pipeline
from patchforge.service.cli.main import app
from patchforge.service.cli.samples import SampleFolder, Subjects
from patchforge.service.errors import InvalidRequest
from tests.patience import PATIENCE
from tests.processes import PATCHFORGE, launch, run
from tests.service.gateway.conftest import gateway, settings, url, worker
from tests.service.gateway.harness import ScriptedWorker, png

__all__ = ["gateway", "settings", "url", "worker"]

COMMAND = *PATCHFORGE, "sample"


def test_classes_take_turns_or_are_drawn_by_index() -> None:
    turns = [Subjects(["a", "b", "c"]).of(index) for index in range(300)]
    assert Counter(turns) == {"a": 100, "b": 100, "c": 100}
    chance = Subjects(["a", "b", "c"], at_random=7)
    drawn = [chance.of(index) for index in range(300)]
    assert drawn == [chance.of(index) for index in range(300)] != turns
    assert min(Counter(drawn).values()) > 70
    assert drawn != [Subjects(["a", "b", "c"], at_random=8).of(index) for index in range(300)]


def flat(index: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 64), (index % 256, index // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def test_samples_are_packed_without_holding_them(tmp_path: Path) -> None:
    count, size = 600, 64 * 64 * 3
    folder = SampleFolder(tmp_path / "made", count)
    folder.begin({})
    for index in folder.missing():
        folder.add(index, flat(index))
    (tmp_path / ".all.npz.1.part").write_bytes(b"of a run that was killed")
    tracemalloc.start()
    try:
        folder.pack(tmp_path / "all.npz")
        assert tracemalloc.get_traced_memory()[1] < count * size / 2
    finally:
        tracemalloc.stop()
    with np.load(tmp_path / "all.npz") as stored:
        assert stored.files == ["arr_0"]
        pixels = stored["arr_0"]
    assert (pixels.shape, pixels.dtype) == ((count, 64, 64, 3), np.uint8)
    assert (pixels[:, 0, 0] == [[index % 256, index // 256, 7] for index in range(count)]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "made"]


def test_samples_that_cannot_be_packed_are_named(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path / "made", 3)
    folder.begin({})
    for index in range(3):
        folder.add(index, flat(index))
    folder.path(1).write_bytes(flat(1)[:50])
    with pytest.raises(InvalidRequest, match=r"000001\.png: cannot be read; delete it"):
        folder.pack(tmp_path / "all.npz")
    folder.add(1, png(1))
    with pytest.raises(InvalidRequest, match=r"000001\.png: not of the size"):
        folder.pack(tmp_path / "all.npz")
    assert not list(tmp_path.glob("*.npz")) + list(tmp_path.glob(".*"))


def test_a_folder_goes_on_only_with_its_own_settings(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, 2)
    folder.begin({"steps": 3, "pair": (1, 2)})
    folder.add(1, flat(1))
    (tmp_path / ".000000.png.1.part").write_bytes(b"half")
    folder.begin({"steps": 3, "pair": (1, 2)})
    assert folder.missing() == [0]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InvalidRequest, match="other settings: steps was 3 and is 4"):
        folder.begin({"steps": 4, "pair": (1, 2)})
    (tmp_path / "samples.json").write_text("[]")
    with pytest.raises(InvalidRequest, match=r"samples\.json: damaged"):
        folder.begin({"steps": 3})
    (tmp_path / "samples.json").unlink()
    with pytest.raises(InvalidRequest, match="pictures of another command"):
        folder.begin({"steps": 3})


def test_a_run_that_is_killed_again_and_again_is_completed(
    bundle_dir: Path, pipelines: dict[str, Pipeline], tmp_path: Path
) -> None:
    count, folder = 96, SampleFolder(tmp_path / "made", 96)
    words = ["--model", bundle_dir / "tiny-class", "--count", count, "--balanced", "--out", folder.folder]
    words += ["--npz", tmp_path / "all.npz", "--steps", 2, "--seed", 100]
    killed = 0
    for wanted in (1, 30, 60):
        process = launch(*COMMAND, *map(str, words))
        while len(list(folder.folder.glob("*.png"))) < wanted and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        killed += process.wait(PATIENCE) == -signal.SIGKILL
    assert killed
    before = {path: path.stat().st_mtime_ns for path in folder.folder.glob("*.png")}
    assert before
    run(*COMMAND, *words)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing is drawn twice
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        *(f"{index:06d}.png" for index in range(count)),
        "samples.json",
    ]
    made = pipelines["tiny-class"].generate(["cat", "dog"] * 48, seed=[*range(100, 196)], steps=2)
    with np.load(tmp_path / "all.npz") as stored:
        assert (stored["arr_0"] == np.stack([np.asarray(picture.image) for picture in made.pictures])).all()

    others = tmp_path / "on two devices"
    words[words.index(folder.folder)] = others
    run(*COMMAND, *words, "--device", "cpu", "--device", "cpu")
    for index in range(count):
        assert (others / f"{index:06d}.png").read_bytes() == folder.path(index).read_bytes()


def test_prompts_take_turns(bundle_dir: Path, pipelines: dict[str, Pipeline], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("apple\npear\n")
    words = ["--model", bundle_dir / "tiny-text", "--count", 3, "--out", tmp_path / "made", "--steps", 2]
    run(*COMMAND, *words, "--prompts", tmp_path / "prompts.txt")
    made = pipelines["tiny-text"].generate(["apple", "pear", "apple"], seed=[0, 1, 2], steps=2)
    for index, picture in enumerate(made.pictures):
        with Image.open(tmp_path / "made" / f"{index:06d}.png") as written:
            assert written.tobytes() == picture.image.tobytes()
            assert written.info["parameters"].startswith(("apple", "pear", "apple")[index])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "emoji-text"], "emoji-text is a text-to-image model: give --prompts"),
        (["--model", "emoji-class", "--prompts", __file__], "--prompts: emoji-class is a class model"),
        (["--model", "emoji-text", "--prompts", __file__, "--balanced"], "--balanced is for classes"),
        (["--model", "emoji-class", "--npz", "a.zip"], "--npz must end in .npz"),
        (["--model", "absent"], "absent"),
    ],
)
def test_errors_are_one_clear_line(
    tmp_path: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        app([*("sample", "--count", "1", "--out", str(tmp_path / "made")), *words])
    assert caught.value.code == 1
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "made").exists()


def test_a_device_that_fails_is_told(tmp_path: Path) -> None:
    words = "--model", "emoji-class", "--count", "1", "--out", "made", "--device", "abacus"
    ran = run(*COMMAND, *words, cwd=tmp_path, status=1)
    assert "device 'abacus' cannot be used here" in ran.stderr


async def test_samples_from_a_server(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    words = ["--model", "tiny-class", "--count", "20", "--out", "made", "--seed", "40", "--balanced"]
    folder = SampleFolder(tmp_path / "made", 20)
    for count in ("6", "20"):
        words[3] = count
        await asyncio.to_thread(run, *COMMAND, *words, "--server", url, "--jobs", "4", cwd=tmp_path)
    assert worker.played == 20
    assert [folder.path(index).read_bytes() for index in range(20)] == [png(40 + index) for index in range(20)]


async def test_a_server_without_the_model_is_told(url: str, worker: ScriptedWorker, tmp_path: Path) -> None:
    words = "--model", "absent", "--count", "2", "--out", "made", "--server", url
    ran = await asyncio.to_thread(run, *COMMAND, *words, cwd=tmp_path, status=1)
    assert "the server has tiny-class, tiny-text" in ran.stderr

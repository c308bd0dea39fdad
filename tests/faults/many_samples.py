"""Draws many samples with a tiny model, killed again and again, and checks them: `python -m tests.faults.many_samples`.

A `make` target runs it as an evaluation of the paper does: 50,000 samples. A slow test runs it with fewer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchforge.model.evaluation.npz import read_npz
from patchforge.model.pipeline import Pipeline
from patchforge.service.soak.memory import resident
from tests.patience import PATIENCE
from tests.processes import PATCHFORGE, launch
from tests.tiny_bundles import write_tiny_bundles

STEPS = 2
FIRST_SEED = 1000
CHECKED = 64
"""Samples that are drawn again, one at a time."""
WARM = 0.1
"""Share of a run's samples after which its memory should not grow."""


@dataclass(frozen=True)
class Outcome:
    """How the samples were made."""

    killed: int
    seconds: float
    warm_bytes: int
    """Resident memory of the last run, which packs too, once it has drawn a tenth of its samples; 0: not seen."""
    peak_bytes: int
    """The most after that."""


def draw(model: Path, folder: Path, npz: Path, count: int, kills: int) -> Outcome:
    """Draw samples, kill the command at random moments of the first half, and let it end.

    Raises:
        AssertionError: a run that is not killed fails, or a sample is written twice.
    """
    chance, began, killed = random.Random(count), time.monotonic(), 0
    words = "--model", model, "--count", count, "--balanced", "--steps", STEPS, "--seed", FIRST_SEED
    command = *PATCHFORGE, "sample", *map(str, words), "--out", str(folder), "--npz", str(npz)
    written: dict[str, int] = {}
    for wanted in sorted(chance.randrange(count // 2) for _ in range(kills)):
        with launch(*command) as process:
            while len(list(_samples(folder))) < wanted and process.poll() is None:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            killed += process.wait(PATIENCE) == -signal.SIGKILL
        _check_kept(written, folder)
    left, sizes = count - len(written), []
    with launch(*command) as process:
        while process.poll() is None:
            if len(list(_samples(folder))) - len(written) >= WARM * left:
                sizes.append(resident(process.pid))
            time.sleep(0.5)
        assert process.returncode == 0
    _check_kept(written, folder)
    sizes = [size for size in sizes if size]  # 0: it has ended
    return Outcome(killed, time.monotonic() - began, sizes[0] if sizes else 0, max(sizes, default=0))


def check(model: Path, folder: Path, npz: Path, count: int) -> None:
    """Check that all samples are there once, each the picture of its own seed and class, and that NumPy reads them.

    Raises:
        AssertionError: they are not.
    """
    assert sorted(os.listdir(folder)) == [*(f"{index:06d}.png" for index in range(count)), "samples.json"]
    assert [path.name for path in npz.parent.iterdir() if path.name.endswith(".part")] == []
    with np.load(npz) as stored:
        pixels = stored["arr_0"]
    assert (pixels.shape[0], pixels.shape[3], pixels.dtype) == (count, 3, np.uint8)
    assert len({hashlib.sha256(picture.tobytes()).digest() for picture in pixels}) == count, "two samples are the same"
    assert all((part == pixels[at : at + len(part)]).all() for at, part in _parts(npz))
    pipeline = Pipeline.open(model)
    classes = pipeline.manifest.class_names
    for index in random.Random(0).sample(range(count), min(count, CHECKED)):
        made = pipeline.generate(classes[index % len(classes)], seed=FIRST_SEED + index, steps=STEPS)
        assert (np.asarray(made.pictures[0].image) == pixels[index]).all(), f"sample {index} differs from its own seed"


def _parts(npz: Path) -> Iterator[tuple[int, np.ndarray]]:
    at = 0
    for part in read_npz(npz, 256):
        yield at, part
        at += len(part)


def _samples(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if entry.name.endswith(".png"))


def _check_kept(written: dict[str, int], folder: Path) -> None:
    """Check that what was there is the same file as before, and note what is new."""
    now = {entry.name: entry.stat().st_mtime_ns for entry in _samples(folder)}
    changed = [name for name, when in written.items() if now.get(name) != when]
    assert not changed, f"written twice: {changed[:5]}"
    written |= now


def main() -> None:
    """Draw, check, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=10)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_tiny_bundles(root)
        model, folder, npz = root / "tiny-class", root / "samples", root / "all.npz"
        made = draw(model, folder, npz, wanted.count, wanted.kills)
        check(model, folder, npz, wanted.count)
        print(f"{wanted.count} samples, killed {made.killed} times: complete, none twice, in {made.seconds:.0f} s")
        print(f"{npz.stat().st_size / 1e6:.0f} MB .npz, read by NumPy; {CHECKED} samples equal those drawn alone")
        warm, peak = made.warm_bytes / 1e6, made.peak_bytes / 1e6
        print(f"memory {warm:.0f} MB after a tenth of the last run, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()

"""`patchforge animate` shows every step, unfinished patches faded, and ends with the finished picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from patchforge.model.pipeline import Pipeline
from patchforge.service.cli.animate import GREY, MARGIN, SIDE
from patchforge.service.cli.main import app


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as opened:
        found = []
        for number in range(opened.n_frames):  # type: ignore[attr-defined]
            opened.seek(number)
            found.append(np.asarray(opened.convert("RGB")).astype(float))
    return found


def test_every_step_is_a_frame_and_the_last_is_the_picture(bundle_dir: Path, tmp_path: Path) -> None:
    bundle, out = bundle_dir / "tiny-text", tmp_path / "new" / "settling.png"
    words = ["animate", "a cat", "a dog", "--bundle", str(bundle), "--out", str(out), "--threads", "1"]
    result = CliRunner().invoke(app, [*words, "--sampler", "euler", "--steps", "3", "--guidance", "1", "--seed", "5"])
    assert result.exit_code == 0, result.output
    frames = frames_of(out)
    assert len(frames) == 4, "three steps and the end"
    assert frames[0].shape[1] == 2 * (SIDE + 2 * MARGIN)
    pipeline = Pipeline.open(bundle)
    made = pipeline.generate("a cat", seed=5, sampler="euler", steps=3, guidance=1.0).pictures[0].image
    inside = frames[-1][MARGIN : MARGIN + SIDE, MARGIN : MARGIN + SIDE]
    assert np.array_equal(inside, np.asarray(made.resize((SIDE, SIDE), Image.Resampling.NEAREST)))
    # Euler finishes no patch early, so the first frame is nearer to grey everywhere.
    first = frames[0][MARGIN : MARGIN + SIDE, MARGIN : MARGIN + SIDE]
    assert np.abs(first - np.array(GREY)).max() <= 0.55 * 160 + 2


@pytest.mark.parametrize("name", ["settling.mp4", "settling"])
def test_another_format_is_refused(name: str, bundle_dir: Path, tmp_path: Path) -> None:
    words = ["animate", "a cat", "--bundle", str(bundle_dir / "tiny-text"), "--out", str(tmp_path / name)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert ".webp, .gif or .png" in result.output
    assert not (tmp_path / name).exists()

"""A picture's file says how it was made, to A1111's readers and to ours."""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchforge.model.metadata import SOFTWARE
from patchforge.model.pipeline import Pipeline
from patchforge.model.results import Picture, Report
from tests.written_settings import written_settings

SETTINGS: dict[str, Any] = {
    "model": "emoji-text",
    "weights_sha256": "0123456789abcdef" * 4,
    "prompt": "red apple, 3d",
    "class_label": None,
    "seed": 2**62,
    "sampler": {"name": "adaptive", "tolerance": 0.2},
    "steps": 8,
    "guidance": 3.0,
    "strength": None,
}
PARAMETERS = (
    f"red apple, 3d\nSteps: 8, Sampler: adaptive, CFG scale: 3, Seed: {2**62}, Size: 48x32, Model hash: 0123456789, "
    f"Model: emoji-text, Version: {SOFTWARE}"
)
FORMATS = ["PNG", "JPEG", "WEBP"]


def made(**changes: Any) -> Picture:
    return Picture(Image.new("RGB", (48, 32), "red"), 7, Report(1, 2), SETTINGS | changes)


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_holds_the_text_that_other_tools_read_and_one_json(output_format: str) -> None:
    text, details = written_settings(made().encode(output_format))
    assert text == PARAMETERS
    used = {name: value for name, value in SETTINGS.items() if value is not None}
    assert details == {"software": SOFTWARE, **used, "width": 48, "height": 32}


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("prompt", ["Äpfel 🍎 « été »", "two\nlines: a, b", "🍎" * 2000, "a\r\tb\x01"])
def test_any_prompt_comes_back_as_it_was(output_format: str, prompt: str) -> None:
    text, details = written_settings(made(prompt=prompt).encode(output_format))
    assert details["prompt"] == prompt
    assert text.startswith(f"{prompt}\nSteps: 8")


@pytest.mark.parametrize("output_format", FORMATS)
def test_without_metadata_there_is_none(output_format: str) -> None:
    data = made().encode(output_format, metadata=False)
    picture = Image.open(BytesIO(data))
    assert not picture.getexif()
    assert not {"parameters", "patchforge", "exif"} & picture.info.keys()


def test_a_variation_tells_how_far_it_went() -> None:
    text, details = written_settings(made(strength=0.6).encode("PNG"))
    assert ", Denoising strength: 0.6, " in text
    assert details["strength"] == 0.6


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp"])
def test_saved_files_hold_it_too(name: str, tmp_path: Path) -> None:
    made().save(tmp_path / name)
    assert written_settings((tmp_path / name).read_bytes())[1]["prompt"] == "red apple, 3d"


def test_other_formats_are_written_without(tmp_path: Path) -> None:
    made().save(tmp_path / "a.bmp")
    with Image.open(tmp_path / "a.bmp") as picture:
        assert picture.size == (48, 32)


def test_what_a_pipeline_draws_says_how_to_draw_it_again(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-class"]
    [first] = pipeline.generate("dog", seed=5, sampler="dual_loop", steps=2, quantile=0.3).pictures
    _, told = written_settings(first.encode("PNG"))
    assert told["weights_sha256"] == pipeline.weights_sha256
    options = dict(told["sampler"])
    again = pipeline.generate(
        told["class_label"],
        seed=told["seed"],
        sampler=options.pop("name"),
        steps=told["steps"],
        guidance=told["guidance"],
        **options,
    )
    assert again.pictures[0].image.tobytes() == first.image.tobytes()


def test_the_hash_is_that_of_the_weights_file(bundle_dir: Path, pipelines: dict[str, Pipeline]) -> None:
    weights = (bundle_dir / "tiny-text" / "model.safetensors").read_bytes()
    assert pipelines["tiny-text"].weights_sha256 == sha256(weights).hexdigest()

"""Pictures with one call. Each prompt is encoded once and without padding; a cut prompt is marked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchforge.model.errors import ParameterError
from patchforge.model.guidance import Branch
from patchforge.model.networks.text_encoder import MiniLM
from patchforge.model.pipeline import Pipeline
from tests.docstrings import run_examples


@pytest.fixture
def pipeline(pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A pipeline that records the prompts it encodes, in `pipeline.read`."""
    opened = pipelines["tiny-text"]
    opened.forget_texts()
    assert opened.encoder is not None
    encode, read = opened.encoder.encode, []
    monkeypatch.setattr(opened.encoder, "encode", lambda prompts: (read.extend(prompts), encode(prompts))[1])
    monkeypatch.setattr(opened, "read", read, raising=False)
    return opened


def test_a_prompt_asked_for_again_is_not_read_again(pipeline: Pipeline) -> None:
    conditions = [pipeline.condition(prompt, None) for prompt in ("apple", "pear " * 40, "apple", "pear " * 40)]
    assert [prompt for prompt in pipeline.read if prompt] == ["apple", "pear " * 40]
    assert [truncated for _, truncated in conditions] == [False, True, False, True]
    pipeline.forget_texts()
    pipeline.condition("apple", None)
    assert pipeline.read[-1] == "apple"


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    made = {
        text: torch.from_numpy(
            np.array(pipeline.generate("apple", guidance=3.0, negative_prompt=text).pictures[0].image)
        )
        for text in (None, "", "pear")
    }
    assert torch.equal(made[""], made[None]), "the null text itself changes no bit"
    assert not torch.equal(made["pear"], made[None])
    condition, _ = pipeline.condition("apple", None, "pear")
    alone, _ = pipeline.condition("pear", None)
    pairs = zip(condition[Branch.NULL].keys_values, alone[Branch.CONDITIONAL].keys_values, strict=True)
    assert all(torch.equal(null, text) for null, text in pairs)
    with pytest.raises(ParameterError) as caught:
        pipelines["tiny-class"].generate("cat", negative_prompt="dog")
    assert caught.value.field == "negative_prompt"


def test_what_is_kept_of_prompts_is_bounded_in_bytes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    condition, _ = pipeline.condition("apple", None)
    pipeline.forget_texts()
    monkeypatch.setattr(pipeline._texts, "limit", 3 * condition[Branch.CONDITIONAL].bytes + 1)
    monkeypatch.setattr(pipeline._states, "limit", 0)
    for prompt in ("apple", "pear", "plum", "apple", "fig", "apple", "plum", "pear"):
        pipeline.condition(prompt, None)
    assert [prompt for prompt in pipeline.read if prompt] == ["apple", "apple", "pear", "plum", "fig", "pear"]


def test_what_the_encoder_made_is_kept_where_refined_texts_are_too_large(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline._texts, "limit", 0)
    for prompt in ("apple", "pear", "apple"):
        assert pipeline.condition(prompt, None)[0][Branch.CONDITIONAL].bytes
    assert pipeline._texts.bytes == 0
    assert [prompt for prompt in pipeline.read if prompt] == ["apple", "pear"]


def test_a_model_draws_every_size_that_it_was_trained_at(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-text"]
    assert list(pipeline.grids) == [(32, 32), (16, 16), (32, 16)]
    patches = {(32, 32): 16, (16, 16): 4, (32, 16): 8}
    for size, count in patches.items():
        made = pipeline.generate("apple", seed=3, size=size, sampler="euler", steps=2)
        assert made.pictures[0].image.size == size
        assert made.report.patch_evaluations == 2 * 2 * count
        grid = pipeline.grid_of(size)
        pixels = torch.from_numpy(np.array(made.pictures[0].image))[None]
        assert pipeline.encode(pixels).shape == (1, grid.patches, grid.values)
    own = [pipeline.generate("apple", seed=3, size=size).pictures[0].image.tobytes() for size in (None, (32, 32))]
    assert own[0] == own[1]
    assert torch.equal(pipeline.noise(5), pipeline.noise(5, pipeline.grid_of((32, 32))))


def test_what_is_read_does_not_depend_on_padding() -> None:
    encoder = MiniLM(max_tokens=12)
    alone, padded = (
        encoder.encode(prompts) for prompts in (["red apple"], ["red apple", "one two three four five six"])
    )
    assert alone.states.shape == padded.states[:1].shape == (1, 12, MiniLM.width)
    torch.testing.assert_close(alone.states, padded.states[:1], atol=1e-5, rtol=0)
    assert alone.mask.sum() == 4
    assert not alone.states[0, 4:].any()
    whole = encoder.tokenizer(["red apple"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.inference_mode():
        states = encoder.network(**whole).last_hidden_state
    torch.testing.assert_close(alone.states[0, :4], states[0, :4], atol=1e-5, rtol=0)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(Pipeline, tmp_path, monkeypatch)
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (256, 256)


def test_pictures_come_in_order_with_their_seeds_and_costs(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["tiny-class"]
    made = pipeline.generate(["cat", "dog", "cat"], seed=[3, 4, 3], sampler="euler", steps=2)
    first, other, again = made.pictures
    assert [picture.seed for picture in made.pictures] == [3, 4, 3]
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert (
        first.image.tobytes() == pipeline.generate("cat", seed=3, sampler="euler", steps=2).pictures[0].image.tobytes()
    )
    assert made.report.patch_evaluations == sum(each.report.patch_evaluations for each in made.pictures)
    assert made.report.savings_ratio == 0  # Euler's method evaluates every patch in every step
    saving = pipeline.generate("cat").report  # the bundle's own sampler
    assert saving.savings_ratio == 1 - saving.patch_evaluations / saving.dense_patch_evaluations > 0


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompts", {"prompts": []}),
        ("seed", {"prompts": ["cat", "dog"], "seed": [1]}),
        ("class_label", {"prompts": "unicorn"}),
        ("class_label", {"prompts": ""}),
        ("steps", {"prompts": "cat", "steps": 0}),
        ("sampler", {"prompts": "cat", "sampler": "warp"}),
        ("size", {"prompts": "cat", "size": (16, 16)}),
        ("quantile", {"prompts": "cat", "sampler": "euler", "quantile": 0.4}),
    ],
)
def test_a_wrong_argument_is_named(pipelines: dict[str, Pipeline], field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ParameterError) as caught:
        pipelines["tiny-class"].generate(**arguments)
    assert caught.value.field == field


def test_small_previews_are_shown_at_full_size(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = pipeline.noise(3)[None]
    whole = pipeline.decode(latents)
    assert torch.equal(pipeline.preview(latents), whole), "without a preview decoder"
    monkeypatch.setattr(pipeline.codec, "preview", lambda _: whole[:, ::2, ::2])
    shown = pipeline.preview(latents)
    assert shown.shape == whole.shape
    assert shown.dtype == torch.uint8
    assert (shown[:, 0, 0] == whole[:, 0, 0]).all()

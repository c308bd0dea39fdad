"""Prompts: read once, without their padding, and said to be cut where they are."""

import pytest
import torch

from model import pipeline as pipeline_module
from model.guidance import Branch
from model.pipeline import Pipeline
from model.text import MiniLM


@pytest.fixture
def pipeline(pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """One that counts what it reads, in ``pipeline.read``."""
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


def test_what_is_kept_of_prompts_is_bounded_in_bytes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    condition, _ = pipeline.condition("apple", None)
    monkeypatch.setattr(pipeline_module, "TEXT_BYTES", 3 * condition[Branch.CONDITIONAL].bytes + 1)
    pipeline.forget_texts()
    for prompt in ("apple", "pear", "plum", "apple", "fig", "apple", "plum", "pear"):
        pipeline.condition(prompt, None)
    assert [prompt for prompt in pipeline.read if prompt] == ["apple", "apple", "pear", "plum", "fig", "pear"]
    monkeypatch.setattr(pipeline_module, "TEXT_BYTES", 0)
    assert pipeline.condition("kiwi", None)[0][Branch.CONDITIONAL].bytes
    assert not pipeline._texts


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

"""Text encoders in local folders: the states are those of `transformers`, and bad folders are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from patchforge.model import text_encoder
from patchforge.model.errors import BundleError, DeviceError
from patchforge.model.recent import Recent
from patchforge.model.storage.encoder_folder import read_encoder_folder
from patchforge.model.text_encoder import LocalEncoder
from tests.model.model_files import DAMAGE, FUZZ, Calls, damaged
from tests.paper_files import WIDTH, write_encoder

CPU = torch.device("cpu")
KINDS = ("clip", "gemma", "qwen3_vl", "siglip", "t5")
TOKENS = 12
Change = Callable[[Path], object]


def load(folder: Path, max_tokens: int = TOKENS) -> LocalEncoder:
    return LocalEncoder(read_encoder_folder(folder), max_tokens, CPU)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    write_encoder(folder, "clip", whole=True, shard_size="5KB")
    return folder


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    """An encoder that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "encoder"))


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_library(tmp_path: Path, kind: str, whole: bool) -> None:
    theirs = write_encoder(tmp_path, kind, whole=whole, shard_size="5KB" if whole else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or whole
    ours = load(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, cut in (("a red apple on a mat", False), ("", False), ("cat " * 20, True)):
        tokens = tokenizer([text], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            expected = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        encoded = ours.encode([text])
        assert encoded.states.shape == (1, TOKENS, WIDTH)
        torch.testing.assert_close(encoded.states, expected.last_hidden_state, rtol=0, atol=1e-5)
        assert torch.equal(encoded.mask, tokens["attention_mask"].bool())
        assert encoded.truncated.tolist() == [cut]


def test_tokens_are_counted_beyond_the_most_that_are_read(original: Path) -> None:
    assert load(original).count("cat " * 20) == 21


def test_weights_are_converted_to_the_asked_precision(original: Path) -> None:
    network = LocalEncoder(read_encoder_folder(original), TOKENS, CPU, torch.bfloat16).network
    assert {each.dtype for each in network.parameters()} == {torch.bfloat16}


def rewrite(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Calls(os.system, f"touch {folder}/marker")))


def link_out(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


def change_weight(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for name in [name for name in weights if name.endswith("text_model.final_layer_norm.bias")]:
            save_file(weights | {name: change(weights[name])}, path)


def text_sizes(folder: Path, **sizes: int) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rewrite(folder, "config.json", text_config=text | sizes)


def move_index(folder: Path, place: object) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    rewrite(folder, "model.safetensors.index.json", weight_map=dict.fromkeys(index, place))


def double(folder: Path) -> None:
    first, *_ = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copyfile(first, folder / "again.safetensors")
    rewrite(folder, "model.safetensors.index.json", weight_map=index | {"more": "again.safetensors"})


REFUSED: dict[str, tuple[Change, str]] = {
    "pickled weights": (rename_weights, r"pytorch_model\.bin is a pickle"),
    "remote code": (lambda f: rewrite(f, "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map asks for code"),
    "a tokenizer's code": (lambda f: rewrite(f, "tokenizer_config.json", auto_map={}), "auto_map asks for code"),
    "quantised": (lambda f: rewrite(f, "config.json", quantization_config={}), "quantised"),
    "another kind": (lambda f: rewrite(f, "config.json", model_type="internvl_chat"), "not a known text encoder"),
    "no kind": (lambda f: rewrite(f, "config.json", model_type=["clip"]), "not a known text encoder"),
    "a part that is none": (lambda f: rewrite(f, "config.json", text_config=[]), "text_config is not an object"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "not JSON"),
    "no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "not JSON"),
    "a link that leads out": (link_out, "a link that leads out"),
    "a shard elsewhere": (lambda f: move_index(f, "../model.safetensors"), "safetensors files of this folder"),
    "a shard that is no name": (lambda f: move_index(f, {"a": 1}), "safetensors files of this folder"),
    "a shard that is missing": (lambda f: move_index(f, "gone.safetensors"), "no such file"),
    "no shards": (lambda f: rewrite(f, "model.safetensors.index.json", weight_map={}), "safetensors files of this"),
    "a tensor twice": (double, "is also in"),
    "more layers than weights": (lambda f: text_sizes(f, num_hidden_layers=200), "missing: encoder.layers.2"),
    "huge sizes": (lambda f: text_sizes(f, hidden_size=10**9), "hidden_size"),
    "other sizes": (lambda f: text_sizes(f, intermediate_size=16_000), "wrong shape"),
    "sizes that do not fit": (lambda f: text_sizes(f, num_attention_heads=3), "cannot be built"),
    "no width": (lambda f: text_sizes(f, hidden_size=None), "the width of the text network is missing"),
    "not finite": (lambda f: change_weight(f, lambda w: w * float("nan")), "holds NaN"),
    "not weights": (lambda f: change_weight(f, lambda w: w.long()), "stored as I64"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json.*save_pretrained"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
    "no padding": (lambda f: rewrite(f, "tokenizer_config.json", pad_token=None), "cannot pad"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_bad_folders_are_refused_with_the_reason(folder: Path, name: str) -> None:
    change, reason = REFUSED[name]
    change(folder)
    with pytest.raises(BundleError, match=reason) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert not (folder / "marker").exists()


def test_more_tokens_than_the_encoder_has_places_for_are_refused(original: Path) -> None:
    with pytest.raises(BundleError, match="reads at most 12 tokens"):
        load(original, 13)


def test_a_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    rewrite(folder, "tokenizer_config.json", pad_token="<beyond>")
    with pytest.raises(BundleError, match="tokens that the network has no vectors for"):
        load(folder)


def test_a_library_without_the_class_is_told(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_encoder.CLASSES, "clip", ("ClipOfTheFuture", "CLIPTextConfig"))
    with pytest.raises(BundleError, match=r"transformers [\d.]+ has no ClipOfTheFuture"):
        load(original)


FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")


@FUZZ
@given(which=st.integers(0, 99), **DAMAGE)
def test_damaged_files_are_read_or_refused(original: Path, which: int, cut: float, changes: list[Any]) -> None:
    shards = sorted(path.name for path in original.glob("*.safetensors"))
    path = original / [*FILES, *shards][which % (len(FILES) + len(shards))]
    whole = path.read_bytes()
    try:
        path.write_bytes(damaged(whole, cut, changes))
        with suppress(BundleError):
            load(original)
    finally:
        path.write_bytes(whole)


def test_the_text_encoder_may_have_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchforge.model.device import text_device

    assert text_device(torch.device("meta")) == torch.device("meta")
    monkeypatch.setenv("PATCHFORGE_TEXT_DEVICE", "cpu")
    assert text_device(torch.device("meta")) == CPU
    monkeypatch.setenv("PATCHFORGE_TEXT_DEVICE", "abacus")
    with pytest.raises(DeviceError, match="abacus"):
        text_device(CPU)


def test_the_most_recently_used_values_are_kept_up_to_a_number_of_bytes() -> None:
    made: list[str] = []

    def make(text: str) -> Callable[[], str]:
        return lambda: made.append(text) or text

    recent: Recent[str, str] = Recent(10, len)
    for text in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb"):
        assert recent.get(text, make(text)) == text
    assert made == ["aaaa", "bbbb", "cccc", "bbbb"]  # c took the place of b, which was used before a
    assert recent.get("x" * 11, make("x" * 11)) == "x" * 11
    assert recent.bytes == 8
    recent.clear()
    assert recent.bytes == 0

"""Weights are read from sound safetensors files only."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from patchforge.model.errors import BundleError
from patchforge.model.storage.bundle import BundleManifest, load_weights, network_shapes
from tests.model.model_files import DAMAGE, FUZZ, class_manifest, damaged, random_weights

MANIFEST = BundleManifest.model_validate(class_manifest())
SHAPES = network_shapes(MANIFEST.network)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(random_weights(MANIFEST), path)
    return path


def test_weights_that_do_not_fit_are_listed(file: Path) -> None:
    expected = dict(SHAPES)
    expected["pos_embed"] = (1, 16, 99)
    expected["extra.weight"] = (3,)
    del expected["final_layer.linear.bias"]
    with pytest.raises(BundleError) as caught:
        load_weights(file, expected)
    message = str(caught.value)
    assert "missing: extra.weight" in message
    assert "unexpected: final_layer.linear.bias" in message
    assert "pos_embed is 1×16×16, not 1×16×99" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    save_file({"good": torch.ones(2), "bad": torch.tensor([1.0, bad], dtype=dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match="bad holds NaN or infinite"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_are_no_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"odd": torch.zeros(2).to(dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match="odd is stored as"):
        load_weights(tmp_path / "w.safetensors")


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(BundleError, match="a header of"):
        load_weights(tmp_path / "w.safetensors")


def test_truncation_anywhere_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            load_weights(file)


def test_shapes_that_overflow_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(BundleError):
        load_weights(tmp_path / "w.safetensors")


@FUZZ
@given(**DAMAGE)
def test_damaged_weights_raise_bundle_errors_only(file: Path, cut: float, changes: list[tuple[float, int]]) -> None:
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    broken = file.with_name("broken.safetensors")
    broken.write_bytes(damaged(whole[:header], cut, changes) + whole[header:])
    with suppress(BundleError):
        load_weights(broken, SHAPES)

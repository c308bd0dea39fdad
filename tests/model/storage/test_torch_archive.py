"""Damaged archives, and archives with more than weights, raise BundleError and nothing else."""

from __future__ import annotations

import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from patchforge.model.errors import BundleError
from patchforge.model.storage.import_checkpoint import import_checkpoint
from tests.model.model_files import DAMAGE, FUZZ, Bring, Calls, config_tree, damaged, rezip, save, tiny_weights


def test_the_legacy_format_is_refused(tmp_path: Path, bring: Bring) -> None:
    torch.save({"state_dict": tiny_weights()}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(BundleError, match="legacy"):
        bring(tmp_path / "old.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path}/marker")))
    with pytest.raises(BundleError, match="bare pickle"):
        bring(tmp_path / "bare.ckpt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"hello", b"\x93NUMPY"])
def test_files_that_are_no_archive_are_refused(tmp_path: Path, bring: Bring, content: bytes) -> None:
    (tmp_path / "odd.ckpt").write_bytes(content)
    with pytest.raises(BundleError, match=r"odd\.ckpt"):
        bring(tmp_path / "odd.ckpt")


def test_a_missing_file_is_named(tmp_path: Path, bring: Bring) -> None:
    with pytest.raises(BundleError, match=r"nowhere\.ckpt"):
        bring(tmp_path / "nowhere.ckpt")


def test_a_truncated_archive_is_refused(ckpt: Path, bring: Bring) -> None:
    whole = ckpt.read_bytes()
    for share in (0.01, 0.5, 0.9, 0.999):
        ckpt.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BundleError):
            bring(ckpt)


def test_a_flipped_bit_in_the_weights_is_noticed(ckpt: Path, bring: Bring) -> None:
    with zipfile.ZipFile(ckpt) as archive:
        at = archive.getinfo("tiny/data/0").header_offset + 200
    data = bytearray(ckpt.read_bytes())
    data[at] ^= 1
    ckpt.write_bytes(data)
    with pytest.raises(BundleError, match="CRC"):
        bring(ckpt)


def test_a_compressed_archive_is_refused(ckpt: Path, bring: Bring) -> None:
    with pytest.raises(BundleError, match="compressed"):
        bring(rezip(ckpt, lambda name, data: data, zipfile.ZIP_DEFLATED))


def test_a_zip_bomb_is_refused(ckpt: Path, bring: Bring) -> None:
    bomb = rezip(ckpt, lambda name, data: b"\0" * (64 << 20) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(BundleError, match="compressed"):
        bring(bomb)


def test_entries_that_claim_more_than_the_file_has_are_refused(ckpt: Path, bring: Bring) -> None:
    data = bytearray(ckpt.read_bytes())
    at = data.index(b"PK\x01\x02")  # the first entry of the zip directory; its two sizes follow at 20
    data[at + 20 : at + 28] = (1 << 30).to_bytes(4, "little") * 2
    ckpt.write_bytes(data)
    with pytest.raises(BundleError, match="more bytes than the file has"):
        bring(ckpt)


def test_numbers_repeated_by_a_stride_are_refused(tmp_path: Path, bring: Bring) -> None:
    weights = tiny_weights()
    weights["pos_embed"] = torch.zeros(1, 1, 1).expand(1, 16, 16)
    with pytest.raises(BundleError, match="does not fit"):
        bring(save(tmp_path, config_tree(), weights))


def test_tensors_that_share_a_storage_cannot_unfold_it(tmp_path: Path, bring: Bring) -> None:
    shared = torch.zeros(16 * 256)
    weights = {name: shared[: tensor.numel()].view(tensor.shape) for name, tensor in tiny_weights(depth=32).items()}
    with pytest.raises(BundleError, match="more memory than the file"):
        bring(save(tmp_path, config_tree(), weights))


def test_storages_of_another_size_than_said_are_refused(ckpt: Path, bring: Bring) -> None:
    with pytest.raises(BundleError, match=r"the data of .* bytes; expected"):
        bring(rezip(ckpt, lambda name, data: data[:-4] if name.endswith("data/3") else data))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tiny/code/model.py", b"import os", "not part of saved weights"),
        ("tiny/constants.pkl", b"\x80\x02N.", "not part of saved weights"),
        ("tiny/../../escape", b"", "not part of saved weights"),
        ("other/data.pkl", b"\x80\x02N.", "one data.pkl"),
        ("other/data/0", b"", "not part of saved weights"),
        ("tiny/data/0/data.pkl", b"\x80\x02N.", "one data.pkl"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_anything_beside_weights_is_refused(ckpt: Path, bring: Bring, name: str, content: bytes, reason: str) -> None:
    with zipfile.ZipFile(ckpt, "a") as archive:
        archive.writestr(name, content)
    with pytest.raises(BundleError, match=reason):
        bring(ckpt)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_entry_of_the_same_name_is_refused(ckpt: Path, bring: Bring) -> None:
    with zipfile.ZipFile(ckpt, "a") as archive:
        archive.writestr("tiny/data/0", b"")
    with pytest.raises(BundleError, match="occurs twice"):
        bring(ckpt)


def test_a_big_endian_file_is_refused(ckpt: Path, bring: Bring) -> None:
    with pytest.raises(BundleError, match="big-endian"):
        bring(rezip(ckpt, lambda name, data: b"big" if name.endswith("byteorder") else data))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save(tmp_path, OmegaConf.create(config_tree()), tiny_weights(depth=1))


@FUZZ
@given(**DAMAGE)
def test_a_damaged_pickle_raises_bundle_errors_only(
    whole: Path, autoencoder: Path, cut: float, changes: list[tuple[float, int]]
) -> None:
    path = rezip(whole, lambda name, data: damaged(data, cut, changes) if name.endswith("data.pkl") else data)
    with suppress(BundleError):
        import_checkpoint(path, autoencoder, path.with_name("out"))


@FUZZ
@given(**DAMAGE, directory=st.booleans())
def test_a_damaged_archive_raises_bundle_errors_only(
    whole: Path, autoencoder: Path, cut: float, changes: list[tuple[float, int]], directory: bool
) -> None:
    data = whole.read_bytes()
    start = data.index(b"PK\x01\x02") if directory else 0
    path = whole.with_name("damaged.ckpt")
    path.write_bytes(data[:start] + damaged(data[start:], cut, changes))
    with suppress(BundleError):
        import_checkpoint(path, autoencoder, path.with_name("out"))

"""Code in a checkpoint is refused by name and never run, like everything else that torch.save would not write."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from patchforge.model.errors import BundleError
from patchforge.model.storage.safe_pickle import read_pickle
from tests.model.model_files import Bring, Calls, config_tree, save, tiny_weights


def _attacks(marker: str) -> dict[str, tuple[Any, str]]:
    """Objects that must not be unpickled, and the global by which each is refused, as protocol 2 names it."""
    touch = f"touch {marker}"
    return {
        "os.system": (Calls(os.system, touch), f"{os.name}.system"),
        "eval": (Calls(eval, f"open({marker!r}, 'w')"), "__builtin__.eval"),
        "exec": (Calls(exec, f"open({marker!r}, 'w')"), "__builtin__.exec"),
        "open": (Calls(open, marker, "w"), "io.open"),
        "getattr": (Calls(getattr, "text", "upper"), "__builtin__.getattr"),
        "subprocess": (Calls(__import__("subprocess").call, ["touch", marker]), "commands.call"),
        "partial": (functools.partial(os.system, touch), "functools.partial"),
        "torch.load": (Calls(torch.load, marker), "torch.serialization.load"),
        "torch.hub": (Calls(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "numpy": (np.zeros(3), "numpy"),
        "bytes": (b"\x80\x02N.", "_codecs.encode"),
        "pickle": (Calls(pickle.loads, "nested"), "pickle.loads"),
        "module": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        "path": (Path("x"), "pathlib"),
        "omegaconf": (Calls(OmegaConf.create, "a: 1"), "getattr"),
    }


ATTACKS = sorted(_attacks(""))


@pytest.mark.parametrize("place", ["top", "config", "omegaconf", "state_dict"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_is_refused_by_name_and_never_run(tmp_path: Path, bring: Bring, attack: str, place: str) -> None:
    marker = tmp_path / "marker"
    payload, named = _attacks(str(marker))[attack]
    config: Any = config_tree()
    state_dict: dict[str, Any] = dict(tiny_weights())
    if place == "config":
        config["params"]["depth"] = payload
    elif place == "omegaconf":
        config = OmegaConf.create(config, flags={"allow_objects": True})
        config._metadata.flags["payload"] = payload
    elif place == "state_dict":
        state_dict["pos_embed"] = payload
    more = {"payload": payload} if place == "top" else {}
    with pytest.raises(BundleError) as caught:
        bring(save(tmp_path, config, state_dict, **more))
    assert "refused" in str(caught.value)
    assert named in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_the_attack_is_real(tmp_path: Path) -> None:
    payload, _ = _attacks(str(tmp_path / "marker"))["os.system"]
    torch.load(save(tmp_path, {}, {}, payload=payload), weights_only=False)
    assert (tmp_path / "marker").exists()


PICKLES = {
    "callable as state": (b"\x80\x02}q\x00ccollections\nOrderedDict\nb.", "state is not a dict"),
    "build on a name": (b"\x80\x02ccollections\nOrderedDict\n}b.", "attributes set on"),
    "call with arguments": (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "OrderedDict with these"),
    "make a dict": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "making an object"),
    "call a mark": (b"\x80\x02c__builtin__\ndict\n)R.", "call of __builtin__.dict"),
    "call a record": (b"\x80\x02comegaconf.dictconfig\nDictConfig\n)R.", "call of omegaconf"),
    "persistent text": (b"\x80\x02X\x01\x00\x00\x00aQ.", "not a tensor storage"),
    "newer protocol": (pickle.dumps({}, protocol=4), "protocol 4"),
    "inst": (b"(ios\nsystem\n.", "INST"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "long integer": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "64 bits"),
    "tuple key": (b"\x80\x02})K\x01s.", "dict key"),
    "huge text": (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),
    "escape no string has": (b"\x80\x02c\\c\nx\n.", "damaged"),
    "missing memo": (b"\x80\x02h\x07.", "damaged"),
    "empty stack": (b"\x80\x02\x85.", "damaged"),
    "past the mark": (b"\x80\x02N(\x85.", "damaged"),
    "no end": (b"\x80\x02N", "damaged"),
    "nothing": (b"", "damaged"),
    "left over": (b"\x80\x02NN.", "damaged"),
}


@pytest.mark.parametrize("name", sorted(PICKLES))
def test_pickles_torch_would_not_write_are_refused(name: str) -> None:
    data, reason = PICKLES[name]
    with pytest.raises(BundleError, match=reason):
        read_pickle(data, "file")


def test_a_huge_memo_index_takes_no_memory() -> None:
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\xff.", "file") is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("K\x00K\x64\x85K\x01\x85", "does not fit"),
        ("K\x05K\x04\x85K\x01\x85", "does not fit"),
        ("K\x00J\x00\x00\x00\x40\x85K\x00\x85", "does not fit"),
        ("K\x00K\x04\x85K\x01K\x01\x86", "impossible shape"),
        ("J\xff\xff\xff\xffK\x04\x85K\x01\x85", "impossible shape"),
        ("K\x00J\xff\xff\xff\xff\x85K\x01\x85", "not a tuple of numbers"),
        ("K\x00\x88\x85K\x01\x85", "not a tuple of numbers"),
    ],
    ids=["too long", "past the end", "stride 0", "ranks", "negative offset", "negative size", "bool"],
)
def test_tensors_outside_their_storage_are_refused(arguments: str, reason: str) -> None:
    storage = "(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"
    data = f"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n({storage}{arguments}\x89}}tR."
    with pytest.raises(BundleError, match=reason):
        read_pickle(data.encode("latin-1"), "file")

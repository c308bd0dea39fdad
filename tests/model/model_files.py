"""Small bundles and checkpoints, whole and broken, for tests of their readers."""

from __future__ import annotations

import collections
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from patchforge.model.networks.config import ClassConfig
from patchforge.model.storage.bundle import BundleManifest, network_shapes
from patchforge.model.storage.manifest import ClassNetwork

Bring = Callable[..., list[str]]
"""Type of the fixture `bring`, which imports a checkpoint."""

SIZES = {
    "in_channels": 4,
    "input_size": 8,
    "depth": 2,
    "hidden_size": 16,
    "patch_size": 2,
    "num_heads": 2,
    "num_classes": 3,
}


def tiny_weights(**changes: int) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the spec."""
    generator = torch.Generator().manual_seed(0)
    shapes = network_shapes(ClassNetwork(config=ClassConfig(**(SIZES | changes))))
    return collections.OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())


def config_tree(**params: Any) -> dict[str, Any]:
    return {"target": "somewhere.PFT", "params": SIZES | {"learn_sigma": True, "name": "tiny"} | params}


def save(folder: Path, config: Any, state_dict: Any, **more: Any) -> Path:
    torch.save({"config": config, "state_dict": state_dict, **more}, folder / "tiny.ckpt")
    return folder / "tiny.ckpt"


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Copy the archive, with every entry passed through `change(name, content)`."""
    out = path.with_name("changed.ckpt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out


class Calls:
    """An object that pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def class_manifest(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "network": {
            "kind": "class",
            "config": {
                "in_channels": 4,
                "input_size": 8,
                "depth": 1,
                "hidden_size": 16,
                "patch_size": 2,
                "num_heads": 2,
                "num_classes": 2,
            },
        },
        "latent": {"channels": 4, "height": 8, "width": 8, "mean": [0.0] * 4, "std": [5.5] * 4},
        "autoencoder": {"downscale": 4, "folder": "autoencoder"},
        "class_names": ["cat", "dog"],
        "licence": "Apache-2.0",
        "defaults": {
            "sampler": {"name": "dual_loop", "quantile": 0.4, "inner_steps": 4, "exact": False},
            "steps": 20,
            "guidance": 2,
        },
        "training": {"steps": 10, "data": {"pictures": 3}},
        "created": 1_700_000_000,
    } | changes


def text_manifest(**changes: Any) -> dict[str, Any]:
    sizes = {"in_dim": 4, "depth": 1, "hidden_dim": 16, "head_dim": 8, "mapping_dim": 8, "mapping_depth": 1}
    text = {"txt_in_dim": 384, "txt_refiner_dim": 16, "txt_refiner_head_dim": 8, "txt_refiner_depth": 1}
    return class_manifest(
        network={"kind": "text", "config": {**sizes, **text, "patch_size": 2, "image_size": 8}},
        text_encoder={"kind": "minilm", "max_tokens": 16, "mask_padding": True},
        class_names=[],
        **changes,
    )


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy `tree`, with the field at the dotted `path` set, or removed if the value is `...`."""
    copy: dict[str, Any] = json.loads(json.dumps(tree))
    *parents, last = path.split(".")
    node = copy
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return copy


def random_weights(manifest: BundleManifest) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = network_shapes(manifest.network)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


DAMAGE = {
    "cut": st.one_of(st.just(1.0), st.floats(0, 1)),
    "changes": st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
}
FUZZ = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def damaged(data: bytes, cut: float, changes: list[tuple[float, int]]) -> bytes:
    broken = bytearray(data[: int(len(data) * cut)])
    for share, value in changes:
        if broken:
            broken[int(share * len(broken))] = value
    return bytes(broken)

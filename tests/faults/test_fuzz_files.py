"""Mutated bundles and checkpoints are read completely or refused with a BundleError. No code runs; memory is small."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from patchforge.model.codec import Codec
from patchforge.model.errors import BundleError
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import network_shapes, open_bundle, read_manifest
from patchforge.model.storage.import_checkpoint import import_checkpoint
from patchforge.model.storage.safe_pickle import Name, Record, TensorRef, read_pickle
from patchforge.model.storage.weights import DTYPES, load_weights
from tests.faults.fuzzing import ANYTHING, amounts, as_json, damaged, fuzz, little_memory, no_code_run
from tests.model.model_files import class_manifest, config_tree, rezip, save, text_manifest, tiny_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def harmless(libraries: None) -> Iterator[None]:
    """Nothing in any file is executed."""
    with no_code_run():
        yield


@pytest.fixture(scope="module")
def libraries(bundle_dir: Path) -> None:
    """Loads libraries before anything is measured."""
    Pipeline.open(bundle_dir / "tiny-class", CPU)


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    """A valid bundle to damage."""
    folder = tmp_path / "bundle"
    for source in (bundle_dir / "tiny-class").rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(bundle_dir / "tiny-class")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


@st.composite
def mutated(draw: st.DrawFn, tree: dict[str, Any]) -> Any:
    """A JSON tree with some of its parts replaced, removed, or with others added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 4))):
        parent: Any = tree
        key = draw(st.sampled_from(sorted(tree)))
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 4)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                parent[key] = draw(ODD_PARTS)
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = draw(ODD_PARTS)
            case "add":
                parent.insert(key, draw(ODD_PARTS))
        if not tree:
            break
    return tree


ODD_PARTS = st.one_of(
    ANYTHING,
    st.integers(-(2**70), 2**70),
    st.integers(-1, 20),
    st.sampled_from([0, 1, 10**9, 2**40, 1e300, "../..", "F16", "F64", [], {}, None, True]),
    st.lists(st.integers(0, 2**34), max_size=4),
)


def refused_or(read: Callable[..., object], *arguments: Any) -> Any:
    """Returns what was read, or None if it was refused. Other exceptions fail, and so does much memory."""
    with suppress(BundleError), little_memory(64):
        return read(*arguments)
    return None


# --- bundles ---


@amounts
def test_bundle_json(tmp_path: Path, cases: int) -> None:
    """What is accepted describes a network that can be laid out without allocating any numbers."""
    trees = [class_manifest(), text_manifest()]

    @fuzz(cases)
    @given(st.sampled_from(trees).flatmap(mutated).map(as_json) | st.sampled_from(trees).map(as_json).flatmap(damaged))
    def holds(content: bytes) -> None:
        (tmp_path / "bundle.json").write_bytes(content)
        manifest = refused_or(read_manifest, tmp_path)
        if manifest is not None:
            assert network_shapes(manifest.network)

    holds()


@amounts
def test_bundles_with_another_description(bundle: Path, cases: int) -> None:
    """Weights, autoencoder and bundle.json that do not fit together make no pipeline."""
    tree = json.loads((bundle / "bundle.json").read_text())

    @fuzz(cases // 5)
    @given(mutated(tree))
    def holds(changed: Any) -> None:
        (bundle / "bundle.json").write_bytes(as_json(changed))
        pipeline = refused_or(Pipeline.open, bundle, CPU)
        if pipeline is not None:
            assert pipeline.manifest.network == open_bundle(bundle).manifest.network

    holds()


@amounts
def test_autoencoder_config(bundle: Path, cases: int) -> None:
    manifest, folder = read_manifest(bundle), bundle / "autoencoder"
    tree = json.loads((folder / "config.json").read_text())

    @fuzz(cases // 5)
    @given(mutated(tree).map(as_json) | damaged(as_json(tree)))
    def holds(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        codec = refused_or(Codec, folder, manifest.latent, CPU)
        if codec is not None:
            latents = torch.zeros(1, manifest.latent.channels, manifest.latent.height, manifest.latent.width)
            assert refused_or(codec.decode, latents).shape[1:3] == manifest.size[::-1]

    holds()


@amounts
@pytest.mark.parametrize("part", ["header", "bytes"])
def test_weights(bundle: Path, cases: int, part: str) -> None:
    """Weights have the right shapes, a known type and finite values; or they are refused."""
    whole = (bundle / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    shapes = network_shapes(read_manifest(bundle).network)
    broken = bundle / "broken.safetensors"

    def with_header(tree: Any) -> bytes:
        header = as_json(tree)
        return struct.pack("<Q", len(header)) + header + whole[end:]

    headers = mutated(json.loads(whole[8:end])).map(with_header)
    others = damaged(whole[:end]).map(lambda head: head + whole[end:]) | damaged(whole)

    @fuzz(cases)
    @given(headers if part == "header" else others)
    def holds(content: bytes) -> None:
        broken.write_bytes(content)
        for expected in (shapes, None):
            weights = refused_or(load_weights, broken, expected)
            for tensor in (weights or {}).values():
                assert tensor.dtype in DTYPES.values()
                assert tensor.isfinite().all()

    holds()


# --- checkpoints ---


@amounts
@pytest.mark.parametrize("part", ["pickle", "directory", "anywhere"])
def test_checkpoints(tmp_path: Path, bundle_dir: Path, cases: int, part: str) -> None:
    """A checkpoint is imported completely, or not at all."""
    autoencoder, out = bundle_dir / ".autoencoder", tmp_path / "out"
    path = save(tmp_path, OmegaConf.create(config_tree()), tiny_weights(depth=1))
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")

    @fuzz(cases)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        changed = tmp_path / "changed.ckpt"
        if part == "pickle":
            rezip(path, lambda name, content: data.draw(damaged(content)) if name.endswith("data.pkl") else content)
        elif part == "directory":
            changed.write_bytes(whole[:directory] + data.draw(damaged(whole[directory:])))
        else:
            changed.write_bytes(data.draw(damaged(whole)))
        if refused_or(import_checkpoint, changed, autoencoder, out) is not None:
            assert open_bundle(out).manifest.name == "out"
        assert {entry.name for entry in tmp_path.iterdir()} <= {"tiny.ckpt", "changed.ckpt", "out"}, "no litter"

    holds()


GLOBALS = ["os system", "posix system", "builtins eval", "__builtin__ exec", "subprocess Popen", "torch load"]
GLOBALS += ["collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch.storage _load"]
GLOBALS += ["omegaconf.dictconfig DictConfig", "copyreg _reconstructor", "functools partial", "pickle loads"]
OPCODES = [
    bytes([code])
    for code in b'(.012FGIJKLMNPQRSTUVX]abcdefgijlopqrst}u)\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a"BC'
]


@amounts
def test_pickles_of_any_opcodes(cases: int) -> None:
    """The interpreter of checkpoints knows only data, so its result is inert."""
    text = st.sampled_from([b"storage", b"0", b"cpu", b"state_dict", b"config", b"touch /tmp/marker"])
    parts = st.one_of(
        st.sampled_from(OPCODES),
        st.sampled_from(GLOBALS).map(lambda name: b"c" + name.replace(" ", "\n").encode() + b"\n"),
        text.map(lambda word: b"X" + struct.pack("<I", len(word)) + word),
        st.integers(0, 255).map(lambda number: b"K" + bytes([number])),
        st.integers(-(2**31), 2**31 - 1).map(lambda number: b"J" + struct.pack("<i", number)),
        st.integers(0, 3).map(lambda number: b"h" + bytes([number])),
        st.integers(0, 3).map(lambda number: b"q" + bytes([number])),
        st.sampled_from([b")R", b"\x85R", b"tR", b")\x81", b"}b", b"tQ", b"(", b"}(", b"u", b"](", b"e"]),
    )
    programs = st.lists(parts, max_size=40).map(lambda program: b"\x80\x02" + b"".join(program) + b".")

    @fuzz(2 * cases)
    @given(programs)
    def holds(program: bytes) -> None:
        assert_inert(refused_or(read_pickle, program, "file"), set())

    holds()


def assert_inert(value: object, seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    match value:
        case dict():
            for part in [*value.keys(), *value.values()]:
                assert_inert(part, seen)
        case list() | tuple():
            for part in value:
                assert_inert(part, seen)
        case Record():
            assert_inert(value.attributes, seen)
        case None | bool() | int() | float() | str() | Name() | TensorRef():
            pass
        case _:
            assert type(value).__name__ == "StorageRef"

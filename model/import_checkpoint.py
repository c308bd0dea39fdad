"""Turns a released ``.ckpt`` and a local autoencoder into a bundle, without executing what the pickle says."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from model.autoencoder_config import AutoencoderConfig
from model.bundle import (
    AUTOENCODER_WEIGHTS,
    explain,
    network_shapes,
    read_autoencoder_config,
    write_streamed_bundle,
)
from model.errors import BundleError
from model.manifest import BundleManifest, ClassConfig, ClassNetwork, Defaults, SamplerChoice
from model.safe_pickle import Record, TensorRef
from model.torch_archive import TorchArchive
from model.weights import check_shapes, load_weights, show

LICENCE = "non-commercial research (as the released checkpoint)"
ANCHOR = "x_embedder.proj.weight"
RELEASED_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Attention heads by width of the released B, L and XL: the one size that no weight's shape shows."""
DEFAULTS = Defaults(
    sampler=SamplerChoice.model_validate({"name": "dual_loop", "quantile": 0.4, "inner_steps": 4}),
    steps=30,
    guidance=2.0,
)
MAX_CLASS_NAMES = 8 << 20
BLOCK = re.compile(r"blocks\.(\d{1,4})\.")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """What a ``.ckpt`` says: settings of the network (scalars only) and where its tensors lie."""

    target: str
    settings: Mapping[str, object]
    tensors: Mapping[str, TensorRef]


def import_checkpoint(
    ckpt: Path,
    autoencoder: Path,
    out: Path,
    *,
    name: str | None = None,
    class_names: Path | None = None,
    licence: str = LICENCE,
    num_heads: int | None = None,
    defaults: Defaults = DEFAULTS,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda message: None,
) -> BundleManifest:
    """Write the bundle ``out`` from a released class-conditional checkpoint; one tensor is in memory at a time.

    Args:
        ckpt: a torch.save archive of ``{"config": …, "state_dict": …}``.
        autoencoder: a diffusers AutoencoderKL folder with safetensors weights; it is copied.
        name: what the model is served as; default: from ``out``'s name.
        class_names: a UTF-8 file, one class a line; default: the numbers from 0.
        num_heads: for a network of other than the released widths whose config does not tell.
        progress: is told each step, and each thing inferred or found at odds.

    Raises:
        BundleError: naming the file and what in it is missing, damaged or refused.
    """
    progress(f"checking the autoencoder {autoencoder}")
    decoder = read_autoencoder_config(autoencoder)
    load_weights(autoencoder / AUTOENCODER_WEIGHTS)
    progress(f"reading {ckpt}; nothing in it is executed")
    with TorchArchive(ckpt) as archive:
        checkpoint = read_checkpoint(archive.read_tree(), str(ckpt), progress)
        config = infer_config(checkpoint, str(ckpt), num_heads, progress)
        network = ClassNetwork(config=config)
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
        check_shapes(str(ckpt), shapes, network_shapes(network))
        archive.check_storages(checkpoint.tensors)
        manifest = _manifest(
            str(ckpt),
            name=name or _name_from(out),
            description=f"Imported from {show(ckpt.name)}",
            network=network,
            latent=_latent(config, decoder),
            autoencoder={"downscale": decoder.downscale},
            class_names=_class_names(class_names, config.num_classes),
            licence=licence,
            defaults=defaults,
            training={"source": show(ckpt.name), "sha256": _sha256(ckpt), "target": checkpoint.target},
            created=max(0, int(ckpt.stat().st_mtime)),
        )

        def read(key: str) -> Tensor:
            return archive.read_tensor(checkpoint.tensors[key])

        progress(f"writing {config.parameters / 1e6:.0f} million parameters in {len(shapes)} tensors to {out}")
        write_streamed_bundle(out, manifest, shapes, read, dtype, autoencoder=autoencoder)
    progress(f"wrote {out}; licence: {licence}")
    return manifest


def read_checkpoint(tree: object, source: str, progress: Progress) -> Checkpoint:
    """Pick the config and the weights out of an inert tree (see `read_pickle`); BundleError if they are not there."""
    if not isinstance(tree, dict) or not isinstance(tree.get("state_dict"), dict):
        raise BundleError(f"{source}: is no {{'config': …, 'state_dict': …}} checkpoint")
    # Only these two levels and scalars are looked at, so circles and shared parts cannot trap the walk.
    config = _settings(tree.get("config"))
    params = _settings(config.get("params"))
    target = config.get("target")
    tensors: dict[str, TensorRef] = {}
    for key, value in tree["state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, TensorRef):
            raise BundleError(f"{source}: state_dict[{show(key)}] is no tensor")
        if not value.storage.dtype.is_floating_point:
            raise BundleError(f"{source}: state_dict[{show(key)}] holds {value.storage.dtype}, not weights")
        tensors[key] = value
    return Checkpoint(
        target=show(target) if isinstance(target, str) else "",
        settings={key: params[key] for key in ClassConfig.model_fields if key in params},
        tensors=_without_prefix(tensors, source, progress),
    )


def infer_config(checkpoint: Checkpoint, source: str, num_heads: int | None, progress: Progress) -> ClassConfig:
    """The network's sizes as its weights show them; where the checkpoint's config says otherwise, that is told."""
    found = _sizes_of(checkpoint.tensors, source)
    for key, size in found.items():
        stated = checkpoint.settings.get(key)
        if stated is not None and stated != size:
            progress(f"the config says {key} = {show(stated)}, the weights say {size}: taking {size}")
    width, stated = found["hidden_size"], checkpoint.settings.get("num_heads")
    if num_heads is not None:
        heads = num_heads
    elif type(stated) is int:
        heads = stated
    elif width in RELEASED_HEADS:
        heads = RELEASED_HEADS[width]
        progress(f"the config does not say num_heads: taking {heads}, as released for width {width}")
    else:
        raise BundleError(f"{source}: the config does not say num_heads, and no weight shows it; give it")
    try:
        return ClassConfig(num_heads=heads, **found)
    except ValidationError as error:
        raise BundleError(f"{source}: an impossible network: {explain(error)}") from error


def _sizes_of(tensors: Mapping[str, TensorRef], source: str) -> dict[str, int]:
    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        tensor = tensors.get(key)
        if tensor is None or len(tensor.shape) != dimensions:
            raise BundleError(f"{source}: no {key} with {dimensions} dimensions: not a class-conditional network")
        return tensor.shape

    width, channels, patch, _ = shape(ANCHOR, 4)
    _, patches, _ = shape("pos_embed", 3)
    rows, _ = shape("y_embedder.embedding_table.weight", 2)
    blocks = [int(match[1]) for key in tensors if (match := BLOCK.match(key))]
    return {
        "in_channels": channels,
        "input_size": math.isqrt(patches) * patch,
        "depth": max(blocks, default=-1) + 1,
        "hidden_size": width,
        "patch_size": patch,
        "num_classes": rows - 1,
    }


def _without_prefix(tensors: dict[str, TensorRef], source: str, progress: Progress) -> dict[str, TensorRef]:
    """The weights of one network, without the ``ema.``, ``model.`` … its names begin with."""
    prefixes = [key.removesuffix(ANCHOR) for key in tensors if key.endswith(ANCHOR)]
    prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]
    if not prefixes:
        raise BundleError(f"{source}: no weight named {ANCHOR}: not a class-conditional network")
    averaged = [prefix for prefix in prefixes if "ema" in prefix]
    if len(prefixes) > 1 and len(averaged) != 1:
        raise BundleError(f"{source}: holds several networks, under {', '.join(map(show, prefixes[:5]))}")
    prefix = averaged[0] if averaged else prefixes[0]
    kept = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if prefix:
        left = [key for key in tensors if not key.startswith(prefix)]
        ignored = f"; leaving out {len(left)} other tensors, such as {show(left[0])}" if left else ""
        progress(f"taking the weights under {show(prefix)}{ignored}")
    return kept


def _settings(node: object) -> dict[object, object]:
    """The entries of a dict or an OmegaConf DictConfig, scalars unwrapped; {} for anything else."""
    if isinstance(node, Record):
        node = node.attributes.get("_content")
    if not isinstance(node, dict):
        return {}
    return {key: _value(value) for key, value in node.items()}


def _value(node: object) -> object:
    return node.attributes["_val"] if isinstance(node, Record) and "_val" in node.attributes else node


def _latent(config: ClassConfig, decoder: AutoencoderConfig) -> dict[str, object]:
    # Stable-Diffusion latents are (autoencoder latents − shift) · scale; a bundle states that as mean and std.
    return {
        "channels": config.in_channels,
        "height": config.input_size,
        "width": config.input_size,
        "mean": [decoder.shift_factor or 0.0] * config.in_channels,
        "std": [1 / decoder.latent_scale] * config.in_channels,
    }


def _manifest(source: str, **fields: object) -> BundleManifest:
    try:
        return BundleManifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError(f"{source}: cannot be described as a bundle: {explain(error)}") from error


def _name_from(out: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", out.absolute().name.lower()).strip("-._")


def _class_names(path: Path | None, count: int) -> tuple[str, ...]:
    if path is None:
        return tuple(map(str, range(count)))
    try:
        if path.stat().st_size > MAX_CLASS_NAMES:
            raise BundleError(f"{path}: more than {MAX_CLASS_NAMES:,} bytes of class names")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if len(names) != count:
        raise BundleError(f"{path}: {len(names)} class names, one a line, for a network of {count} classes")
    return names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

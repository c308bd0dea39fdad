"""Find the network in a checkpoint's pickled tree: its kind, its weights, and its sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from patchforge.model.errors import BundleError
from patchforge.model.networks.config import ClassConfig, TextConfig
from patchforge.model.storage.files import explain_error
from patchforge.model.storage.safe_pickle import Record, TensorRef
from patchforge.model.storage.weights import printable

Kind = Literal["class", "text"]
Progress = Callable[[str], None]

ANCHORS: Mapping[Kind, str] = {"class": "x_embedder.proj.weight", "text": "merge.proj.weight"}
"""A weight of each network that the other has not."""
CONFIGS: Mapping[Kind, type[ClassConfig | TextConfig]] = {"class": ClassConfig, "text": TextConfig}
AVERAGED = "ema_model."
"""Prefix of the averaged weights in training checkpoints."""
COMPILED = "_orig_mod."
"""torch.compile puts this into the names of what it compiled."""
RELEASED_HEADS = {768: 12, 1024: 16, 1152: 16}
"""Width → attention heads of the released B, L and XL. No weight's shape shows this number."""


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a `.ckpt` that we use: the network's settings (scalars only), and references to its tensors."""

    kind: Kind
    target: str
    settings: Mapping[str, object]
    tensors: Mapping[str, TensorRef]


def read_checkpoint(tree: object, source: str, progress: Progress) -> Checkpoint:
    """Find the config and the weights in the result of `read_pickle`.

    The config is under `config`, or in a training checkpoint under `hyper_parameters.model`.

    Raises:
        BundleError: they are not there.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("state_dict"), dict):
        raise BundleError(f"{source}: not a checkpoint of the form {{'config': …, 'state_dict': …}}")
    # We read only these levels and scalars, so cycles and shared parts cannot trap us.
    config = _unwrap_settings(tree.get("config", _unwrap_settings(tree.get("hyper_parameters")).get("model")))
    params = _unwrap_settings(config.get("params")) or config
    target = config.get("target", config.get("_target_"))
    tensors: dict[str, TensorRef] = {}
    for key, value in tree["state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, TensorRef):
            raise BundleError(f"{source}: state_dict[{printable(key)}] is not a tensor")
        tensors[key.replace(COMPILED, "")] = value
    kind, kept = _select_network(tensors, source, progress)
    for key, tensor in kept.items():
        if not tensor.storage.dtype.is_floating_point:
            raise BundleError(f"{source}: state_dict[{printable(key)}] holds {tensor.storage.dtype}, not weights")
    return Checkpoint(
        kind=kind,
        target=printable(target) if isinstance(target, str) else "",
        settings={key: params[key] for key in CONFIGS[kind].model_fields if key in params},
        tensors=kept,
    )


def infer_class_config(checkpoint: Checkpoint, source: str, num_heads: int | None, progress: Progress) -> ClassConfig:
    """Infer the sizes of a class-conditional network. `progress` gets a message where the config differs.

    Raises:
        BundleError: the sizes are impossible, or the number of heads is unknown.
    """
    shapes = _Shapes(checkpoint, source)
    width, channels, patch, _ = shapes.of(ANCHORS["class"], 4)
    _, patches, _ = shapes.of("pos_embed", 3)
    rows, _ = shapes.of("y_embedder.embedding_table.weight", 2)
    found = {
        "in_channels": channels,
        "input_size": math.isqrt(patches) * patch,
        "depth": shapes.count(r"blocks\.(\d{1,4})\."),
        "hidden_size": width,
        "patch_size": patch,
        "num_classes": rows - 1,
    }
    _tell_differences(checkpoint, found, progress)
    stated = checkpoint.settings.get("num_heads")
    if num_heads is not None:
        heads = num_heads
    elif type(stated) is int:
        heads = stated
    elif width in RELEASED_HEADS:
        heads = RELEASED_HEADS[width]
        progress(f"the config does not say num_heads: using {heads}, as in the released network of width {width}")
    else:
        raise BundleError(f"{source}: num_heads is unknown: neither config nor weights show it; give --num-heads")
    try:
        return ClassConfig(num_heads=heads, **found)
    except ValidationError as error:
        raise BundleError(f"{source}: an impossible network: {explain_error(error)}") from error


def infer_text_config(checkpoint: Checkpoint, source: str, side: int, progress: Progress) -> TextConfig:
    """Infer the sizes of a text-to-image network for latents of `side` × `side`. The weights show all but that.

    Raises:
        BundleError: the sizes are impossible.
    """
    shapes = _Shapes(checkpoint, source)
    width, values = shapes.of(ANCHORS["text"], 2)
    out, _ = shapes.of("split.proj.weight", 2)
    patch = math.isqrt(max(out - values, 1))  # the output has one channel more: patch² values
    refiner, text = shapes.of("txt_proj.weight", 2)
    depth = shapes.count(r"txt_refiner\.(\d{1,4})\.")
    found = {
        "in_dim": values // patch**2,
        "depth": shapes.count(r"blocks\.(\d{1,4})\."),
        "hidden_dim": width,
        "head_dim": width // max(*shapes.of("blocks.0.self_attn.scale", 1), 1),
        "mapping_dim": shapes.of("t_embedder.time_in_proj.weight", 2)[0],
        "mapping_depth": shapes.count(r"t_embedder\.mapping\.blocks\.(\d{1,4})\."),
        "patch_size": patch,
        "txt_in_dim": text,
        "txt_refiner_dim": refiner,
        "txt_refiner_depth": depth,
    }
    heads = max(*shapes.of("txt_refiner.0.self_attn.scale", 1), 1) if depth else 1
    found["txt_refiner_head_dim"] = refiner // heads
    _tell_differences(checkpoint, found, progress)
    try:
        return TextConfig(image_size=side, **found)
    except ValidationError as error:
        raise BundleError(f"{source}: an impossible network: {explain_error(error)}") from error


class _Shapes:
    """Shapes of a checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint, source: str) -> None:
        self.tensors = checkpoint.tensors
        self.missing = f"{source}: not a {_NAMES[checkpoint.kind]} network: no"

    def of(self, key: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a weight that must have so many dimensions."""
        tensor = self.tensors.get(key)
        if tensor is None or len(tensor.shape) != dimensions:
            raise BundleError(f"{self.missing} {key} with {dimensions} dimensions")
        return tensor.shape

    def count(self, pattern: str) -> int:
        """Return one more than the largest number in the names that begin with `pattern`, or 0."""
        return 1 + max((int(match[1]) for key in self.tensors if (match := re.match(pattern, key))), default=-1)


_NAMES: Mapping[Kind, str] = {"class": "class-conditional", "text": "text-to-image"}


def _tell_differences(checkpoint: Checkpoint, found: Mapping[str, int], progress: Progress) -> None:
    for key, size in found.items():
        stated = checkpoint.settings.get(key)
        if stated is not None and stated != size:
            progress(f"the config says {key} = {printable(stated)}, the weights say {size}: using {size}")


def _select_network(
    tensors: dict[str, TensorRef], source: str, progress: Progress
) -> tuple[Kind, dict[str, TensorRef]]:
    """Select the weights of one network (the moving average if there is one), without their prefix, such as `ema.`."""
    found = [
        (key.removesuffix(anchor), kind)
        for key in tensors
        for kind, anchor in ANCHORS.items()
        if key == anchor or key.endswith(f".{anchor}")
    ]
    if not found:
        names = " or ".join(ANCHORS.values())
        raise BundleError(f"{source}: holds neither network: no weight is named {names}")
    averaged = [each for each in found if each[0] == AVERAGED] or [each for each in found if "ema" in each[0]]
    if len(found) > 1 and len(averaged) != 1:
        raise BundleError(f"{source}: holds several networks: {', '.join(printable(each[0]) for each in found[:5])}")
    prefix, kind = averaged[0] if averaged else found[0]
    kept = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if prefix:
        left = [key for key in tensors if not key.startswith(prefix)]
        ignored = f"; ignoring {len(left)} other tensors, such as {printable(left[0])}" if left else ""
        progress(f"using the weights under {printable(prefix)}{ignored}")
    return kind, kept


def _unwrap_settings(node: object) -> dict[object, object]:
    """Return the entries of a dict or an OmegaConf DictConfig, with scalars unwrapped; {} for anything else."""
    if isinstance(node, Record):
        node = node.attributes.get("_content")
    if not isinstance(node, dict):
        return {}
    return {key: _unwrap_scalar(value) for key, value in node.items()}


def _unwrap_scalar(node: object) -> object:
    return node.attributes["_val"] if isinstance(node, Record) and "_val" in node.attributes else node

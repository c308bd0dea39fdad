"""Trains a model on a table of pictures and exports bundles: the work of `patchforge train`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from patchforge.model.errors import DataError
from patchforge.model.networks.build import build_network
from patchforge.model.networks.config import ClassConfig, TextConfig
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.text_encoder import MiniLM
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.storage.bundle import Bundle, explain_error, load_weights, network_shapes
from patchforge.model.training.conditions import ClassConditions, Conditions, TextConditions
from patchforge.model.training.data import PATCH_SIZE, Pictures, check_side
from patchforge.model.training.export import MAX_TOKENS, Drawn, Export, Kind, prompt_of
from patchforge.model.training.latents import autoencoder_downscale, encode_pictures, latent_scale
from patchforge.model.training.loop import Recipe, Trainer
from patchforge.model.training.validation import Validation

__all__ = ["Kind", "Size", "build", "load_network", "prompt_of", "train_model", "unpack_autoencoder"]


@dataclass(frozen=True)
class Size:
    """Width and depth of a network. Attention heads have a width of 32."""

    width: int = 192
    depth: int = 6
    refiner_width: int = 128
    refiner_depth: int = 2
    mapping_width: int = 96


def train_model(
    kind: Kind,
    pictures: Pictures,
    autoencoder: Path,
    folder: Path,
    recipe: Recipe,
    size: Size,
    licence: str,
    start: Bundle | None = None,
    cache: Path | None = None,
    trunk: Path | None = None,
) -> Path:
    """Train a model, or continue. Keeps state, log, sample grids and the latest bundle in `folder`.

    `start` is a bundle of the same kind; a new run takes its weights, sizes and autoencoder. `cache` is a folder for
    encoded pictures and captions, by default beside `folder`. `trunk` is a bundle or a weights file of another
    network; a new run takes those of its weights that fit. Returns the bundle's folder.

    Raises:
        DataError: a class-conditional model was requested, but the pictures have no classes; `start` does not fit;
            its pictures are larger than these; or the folder's state belongs to a network of other sizes.
    """
    if kind == "class" and len(pictures.class_names) < 2:
        raise DataError("a class-conditional model needs pictures in at least two class subfolders")
    if start is not None:
        pictures = _in_size_of(start, pictures)
    shown = pictures.where(pictures.trained())
    own = folder / "autoencoder"
    if start is not None:
        autoencoder = unpack_autoencoder(start, own)
    elif own.exists():  # a run that started from a bundle keeps its latents, even if resumed without naming the bundle
        autoencoder = own
    small_size = None if recipe.small is None else recipe.small.size
    check_sizes(autoencoder, pictures.images.shape[1], small_size)
    cache = cache or folder.parent / "cache"
    latents = encode_pictures(shown.images, autoencoder, cache)
    small = None if small_size is None else shown.resized(small_size)
    small_latents = None if small is None else encode_pictures(small.images, autoencoder, cache)
    torch.manual_seed(recipe.seed)
    if start is None:
        network = build(kind, latents.shape[1], latents.shape[-1], len(shown.class_names), size)
        if trunk is not None:
            copy_trunk(network, trunk)
    else:
        network = load_network(start, kind, shown)

    def conditions_of(part: Pictures) -> Conditions:
        return ClassConditions(part) if kind == "class" else TextConditions(part, MAX_TOKENS, cache)

    conditions = conditions_of(shown)
    trainer = Trainer(network, latents, torch.from_numpy(shown.weights), conditions, recipe, folder, small_latents)
    if start is not None:
        trainer.earlier_samples = samples_seen(start)
    validation = Validation(pictures, small_size, autoencoder, cache, conditions_of)
    exports = [Export(folder / f"{folder.name}-bundle", Drawn.from_table(shown), kind, autoencoder, licence)]
    if small is not None and kind == "text":  # the same network, as a bundle of the smaller size
        name = f"{folder.name}-{small_size}-bundle"
        exports.append(Export(folder / name, Drawn.from_table(small), kind, autoencoder, licence))
    del pictures, shown, small  # gigabytes, and not needed any more

    def export(trainer: Trainer) -> None:
        validation.write(trainer)
        for each in exports:
            each.write(trainer)

    for each in exports:
        each.manifest(trainer)  # fail now, not after training
    trainer.run(export)
    return exports[0].out


def check_sizes(autoencoder: Path, side: int, small: int | None) -> None:
    """Check that pictures of these sizes can be cut into whole patches of the autoencoder's latents.

    Raises:
        DataError: they cannot, or there is no such autoencoder.
    """
    latent_scale(autoencoder)  # has the clearer error if there is none
    multiple = autoencoder_downscale(autoencoder) * PATCH_SIZE
    check_side(side, multiple, "the size of the pictures")
    if small is not None:
        check_side(small, multiple, "--small")


def _in_size_of(start: Bundle, pictures: Pictures) -> Pictures:
    """Reduce pictures to the size that a bundle draws.

    Raises:
        DataError: they are smaller.
    """
    side, wanted = pictures.images.shape[1], start.manifest.size[0]
    if side < wanted:
        raise DataError(f"the pictures have {side} pixels, but {start.name} draws {wanted}: make the table with --size")
    return pictures.resized(wanted)


def unpack_autoencoder(bundle: Bundle, folder: Path) -> Path:
    """Write a bundle's autoencoder in the format of `train_autoencoder`, to continue training in the same latents.

    Raises:
        DataError: the bundle does not say how its autoencoder was trained.
    """
    figures = bundle.manifest.training.get("autoencoder")
    if figures is None:
        raise DataError(f"{bundle.folder} does not record its autoencoder's latent statistics: it was not trained here")
    shutil.copytree(bundle.autoencoder, folder, dirs_exist_ok=True)
    (folder / "latents.json").write_text(json.dumps(figures, indent=2) + "\n")
    return folder


def samples_seen(bundle: Bundle) -> int:
    """Count the samples of all runs that led to a bundle."""
    record = bundle.manifest.training
    return sum(value for key in ("samples", "earlier_samples") if isinstance(value := record.get(key, 0), int))


def load_network(bundle: Bundle, kind: Kind, pictures: Pictures) -> PFT | TextPFT:
    """Load the trained network of a bundle, in float32.

    Raises:
        DataError: it is of the other kind, or has other classes than `pictures`.
    """
    manifest = bundle.manifest
    if manifest.network.kind != kind or (kind == "class" and list(manifest.class_names) != pictures.class_names):
        raise DataError(f"{bundle.folder} is not a {kind} model for these pictures")
    network = build_network(manifest.network.config)
    network.load_state_dict(load_weights(bundle.weights, network_shapes(manifest.network), dtype=torch.float32))
    return network


def copy_trunk(network: nn.Module, source: Path) -> int:
    """Copy every weight that has the same name and shape in `source`, a bundle or a safetensors file; count them.

    Raises:
        DataError: the file cannot be read, or fewer than half of the network's weights are in it.
    """
    path = source / "model.safetensors" if source.is_dir() else source
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} holds no weights: {error}") from error
    own = network.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if sum(own[name].numel() for name in fitting) < sum(each.numel() for each in own.values()) / 2:
        raise DataError(f"{path} is of another network: only {len(fitting)} of {len(own)} weights fit")
    network.load_state_dict(fitting, strict=False)
    return len(fitting)


def build(kind: Kind, channels: int, side: int, classes: int, size: Size) -> PFT | TextPFT:
    """Build an untrained network for latents of `side` × `side`.

    Raises:
        DataError: no network can have these sizes.
    """
    try:
        return build_network(
            _class_config(channels, side, classes, size) if kind == "class" else _text_config(channels, side, size)
        )
    except ValidationError as error:
        raise DataError(f"no network can have these sizes: {explain_error(error)}") from error


def _class_config(channels: int, side: int, classes: int, size: Size) -> ClassConfig:
    return ClassConfig(
        in_channels=channels,
        input_size=side,
        depth=size.depth,
        hidden_size=size.width,
        patch_size=PATCH_SIZE,
        num_heads=size.width // 32,
        num_classes=classes,
    )


def _text_config(channels: int, side: int, size: Size) -> TextConfig:
    return TextConfig(
        in_dim=channels,
        depth=size.depth,
        hidden_dim=size.width,
        head_dim=32,
        mapping_dim=size.mapping_width,
        mapping_depth=2,
        patch_size=PATCH_SIZE,
        txt_in_dim=MiniLM.width,
        txt_refiner_dim=size.refiner_width,
        txt_refiner_head_dim=32,
        txt_refiner_depth=size.refiner_depth,
        image_size=side,
    )

"""A model bundle: one folder with weights, a manifest (`bundle.json`) and an autoencoder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from patchforge.model.errors import BundleError
from patchforge.model.networks.build import build_network
from patchforge.model.networks.row_wise import product_weights
from patchforge.model.shipped import BUNDLES, SHIPPED, bundle_folder
from patchforge.model.storage.autoencoder_config import CONFIG, AutoencoderConfig
from patchforge.model.storage.encoder_folder import EncoderFolder, read_encoder_folder
from patchforge.model.storage.files import (
    explain_error,
    hash_file,
    hash_hashes,
    mention_pickles,
    read_json,
    require_file,
    require_inside,
)
from patchforge.model.storage.manifest import BundleManifest, FolderEncoder, Network
from patchforge.model.storage.weights import Shape, check_shapes, load_weights, read_shapes, write_weights

__all__ = ["Bundle", "BundleManifest", "explain_error", "find_bundles", "list_bundles", "load_weights", "open_bundle"]
__all__ += ["load_network_weights", "network_shapes", "read_autoencoder_config", "read_manifest", "write_bundle"]
__all__ += ["write_manifest", "write_streamed_bundle"]

MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder"
AUTOENCODER_CONFIG = "config.json"
AUTOENCODER_WEIGHTS = "diffusion_pytorch_model.safetensors"
LARGE = 200_000_000
"""Parameters. The paper's B has 130 million, L 458, XL 675."""
AUTOENCODER_COUNTER = "bn.num_batches_tracked"
"""Among the weights of an AutoencoderKLFlux2, but none."""
AUTOENCODER_PREVIEW = "preview.safetensors"
"""Not the library's, and not every autoencoder has one."""


@dataclass(frozen=True)
class Bundle:
    """A complete bundle folder and its manifest."""

    folder: Path
    manifest: BundleManifest

    @property
    def name(self) -> str:
        """The name under which requests ask for it."""
        return self.manifest.name

    @property
    def weights(self) -> Path:
        """The network's safetensors file, for `load_weights`."""
        return self.folder / WEIGHTS

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weights file, in hexadecimal: which model this is, whatever it is called.

        Raises:
            BundleError: the file cannot be read.
        """
        return hash_file(self.weights)

    @cached_property
    def digest(self) -> str:
        """Which bundle this is: the SHA-256 of the names and contents of its files, in hexadecimal.

        A text encoder's files count by the SHA-256 in `bundle.json`, which is checked when they are loaded. MiniLM
        comes with a package, and does not count.

        Raises:
            BundleError: a file cannot be read.
        """
        names = [MANIFEST, f"{AUTOENCODER}/{AUTOENCODER_CONFIG}", f"{AUTOENCODER}/{AUTOENCODER_WEIGHTS}"]
        if (self.autoencoder / AUTOENCODER_PREVIEW).is_file():
            names.append(f"{AUTOENCODER}/{AUTOENCODER_PREVIEW}")
        return hash_hashes({name: hash_file(self.folder / name) for name in names} | {WEIGHTS: self.weights_sha256})

    @property
    def autoencoder(self) -> Path:
        """The autoencoder's folder, in diffusers format."""
        return self.folder / AUTOENCODER

    @property
    def text_encoder(self) -> Path | None:
        """The text encoder's folder, if the bundle has one or shares it."""
        encoder = self.manifest.text_encoder
        return encoder_place(self.folder, encoder) if isinstance(encoder, FolderEncoder) else None


def list_bundles(root: Path) -> list[Bundle]:
    """Find the bundles in the subfolders of `root`, sorted by name.

    Hidden folders and folders without a bundle.json are skipped.

    Raises:
        BundleError: `root` is not a folder, or a bundle is broken, lies behind a link that leads out of `root`, or has
            the same name as another.
    """
    if not root.is_dir():
        raise BundleError(f"{root}: no such folder")
    found: dict[str, Bundle] = {}
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not (folder / MANIFEST).exists():
            continue
        require_inside(root, folder)
        bundle = open_bundle(folder)
        if bundle.name in found:
            raise BundleError(f"{folder}: has the same name as {found[bundle.name].folder}, {bundle.name}; rename one")
        found[bundle.name] = bundle
    return [found[name] for name in sorted(found)]


def find_bundles(places: Sequence[Path]) -> dict[str, Bundle]:
    """The bundles of several places by their names: each is a bundle, a folder of bundles, or `shipped`.

    Raises:
        BundleError: as `list_bundles`; or bundles of two places have the same name.
    """
    found: dict[str, Bundle] = {}
    for place in places:
        root = BUNDLES if place == SHIPPED and not place.exists() else place
        for bundle in [open_bundle(root)] if (root / MANIFEST).is_file() else list_bundles(root):
            known = found.setdefault(bundle.name, bundle)
            if known.folder.resolve() != bundle.folder.resolve():
                raise BundleError(f"{bundle.folder}: has the same name as {known.folder}, {bundle.name}; rename one")
    return found


def open_bundle(bundle: Path | str) -> Bundle:
    """Open a bundle, given its folder or the name of a shipped bundle. Checks all files, but reads no weights.

    Raises:
        BundleError: a file is missing or damaged, or does not fit the others.
    """
    folder = bundle_folder(bundle)
    manifest = read_manifest(folder)
    require_file(folder, WEIGHTS)
    autoencoder = read_autoencoder_config(folder / AUTOENCODER)
    for name in (AUTOENCODER_CONFIG, AUTOENCODER_WEIGHTS):
        require_file(folder, f"{AUTOENCODER}/{name}")
    _check_autoencoder_fits(folder, manifest, autoencoder)
    if isinstance(manifest.text_encoder, FolderEncoder):
        _check_encoder(encoder_place(folder, manifest.text_encoder), manifest.text_encoder)
    return Bundle(folder, manifest)


def encoder_place(folder: Path, encoder: FolderEncoder) -> Path:
    """Return the folder of a bundle's text encoder: in the bundle's folder, or beside it."""
    shared = encoder.folder.startswith("../")
    return (folder.absolute().parent if shared else folder) / encoder.folder.removeprefix("../")


def _check_encoder(place: Path, encoder: FolderEncoder) -> EncoderFolder:
    if not place.is_dir():
        raise BundleError(f"{place}: no such folder; bundle.json names it as the text encoder")
    require_inside(place.parent, place)
    found = read_encoder_folder(place)
    for what, value, expected in (("kind", found.kind, encoder.kind), ("width", found.width, encoder.width)):
        if value != expected:
            raise BundleError(f"{place}: the encoder's {what} is {value}, but text_encoder.{what} is {expected}")
    return found


def read_manifest(folder: Path) -> BundleManifest:
    """Read `folder`'s bundle.json.

    Raises:
        BundleError: the file is missing or wrong; the message names the field.
    """
    path = require_file(folder, MANIFEST)
    try:
        return BundleManifest.model_validate_json(read_json(path))
    except ValidationError as error:
        raise BundleError(f"{path}: {explain_error(error)}") from error


def read_autoencoder_config(folder: Path) -> AutoencoderConfig:
    """Read the config of a diffusers autoencoder folder, and check that its weights are safetensors.

    Raises:
        BundleError: a file is missing, or the config is wrong.
    """
    path = require_file(folder, AUTOENCODER_CONFIG)
    if not (folder / AUTOENCODER_WEIGHTS).is_file():
        pickles = mention_pickles(folder)
        raise BundleError(f"{folder}: no {AUTOENCODER_WEIGHTS}{pickles}. Use an autoencoder with safetensors weights")
    try:
        return CONFIG.validate_json(read_json(path))
    except ValidationError as error:
        raise BundleError(f"{path}: {explain_error(error)}") from error


def load_autoencoder_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a diffusers autoencoder folder, as they are stored.

    Raises:
        BundleError: as `load_weights`.
    """
    path = folder / AUTOENCODER_WEIGHTS
    return load_weights(path, names=read_shapes(path).keys() - {AUTOENCODER_COUNTER})


def load_network_weights(bundle: Bundle) -> dict[str, Tensor]:
    """Read the weights of a bundle's network, for `build_around`.

    They are float32. But of a large network, most stay as they are stored: half the memory, if that is 16 bits. Small
    networks have float32, because converting at every product would take up to a fifth of their time.

    Raises:
        BundleError: as `load_weights`.
    """
    network = bundle.manifest.network
    with torch.device("meta"):
        built = build_network(network.config)
    kept = product_weights(built) if network.config.parameters > LARGE else set()
    return load_weights(bundle.weights, _shapes_of(built), dtype=torch.float32, as_stored=kept)


def network_shapes(network: Network) -> dict[str, Shape]:
    """Name and shape of every weight of a network, for `load_weights`. Allocates no memory for weights."""
    with torch.device("meta"):
        built = build_network(network.config)
    return _shapes_of(built)


def _shapes_of(network: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def write_bundle(
    folder: Path,
    manifest: BundleManifest,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    autoencoder: Path | None = None,
    text_encoder: Path | None = None,
) -> None:
    """Write or replace the bundle in `folder`. It is written beside it and then renamed, so no reader sees half of it.

    Args:
        folder: the bundle's folder.
        manifest: becomes bundle.json.
        state_dict: the network's weights.
        dtype: float32, float16 or bfloat16; small tensors stay float32.
        autoencoder: a diffusers folder to copy; None keeps the autoencoder of the old bundle.
        text_encoder: the same for a text encoder's folder, if the manifest says that the bundle holds one.

    Raises:
        BundleError: the parts do not fit together, a weight is not finite, or `folder` exists and is not a bundle.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    parts = {"autoencoder": autoencoder, "text_encoder": text_encoder}
    write_streamed_bundle(folder, manifest, shapes, state_dict.__getitem__, dtype, **parts)


def write_streamed_bundle(
    folder: Path,
    manifest: BundleManifest,
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    autoencoder: Path | None = None,
    text_encoder: Path | None = None,
) -> None:
    """Like `write_bundle`, for weights too large to hold in memory: `read(name)` returns one tensor of `shapes`."""
    folder = folder.absolute()
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: exists and is not a bundle; choose a new folder")
    check_shapes(str(folder), shapes, network_shapes(manifest.network))
    source = autoencoder if autoencoder is not None else folder / AUTOENCODER
    _check_autoencoder_fits(source, manifest, read_autoencoder_config(source))
    copies = _find_encoder_files(folder, manifest, text_encoder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            stage = Path(scratch) / "new"
            (stage / AUTOENCODER).mkdir(parents=True)
            for name in (AUTOENCODER_CONFIG, AUTOENCODER_WEIGHTS):
                shutil.copyfile(source / name, stage / AUTOENCODER / name)
            if (source / AUTOENCODER_PREVIEW).is_file():
                shutil.copyfile(source / AUTOENCODER_PREVIEW, stage / AUTOENCODER / AUTOENCODER_PREVIEW)
            for name, path in copies.items():
                (stage / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, stage / name)
            write_weights(stage / WEIGHTS, shapes, read, dtype)
            (stage / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
            read_manifest(stage)
            _replace_folder(stage, folder, Path(scratch) / "old")
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error}") from error


def _find_encoder_files(folder: Path, manifest: BundleManifest, source: Path | None) -> dict[str, Path]:
    """Check the text encoder of a bundle that will be in `folder`. Return the files to copy, by their names there."""
    encoder = manifest.text_encoder
    if not isinstance(encoder, FolderEncoder):
        return {}
    place = encoder_place(folder, encoder)
    found = _check_encoder(source or place, encoder)
    return {f"{encoder.folder}/{name}": found.folder / name for name in found.files if place.parent == folder}


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Replace `folder`'s bundle.json, in one rename.

    Raises:
        BundleError: `folder` is not a bundle.
    """
    path = require_file(folder, MANIFEST)
    new = path.with_suffix(".new")
    new.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _replace_folder(stage: Path, folder: Path, old: Path) -> None:
    """Move `folder` to `old` and `stage` to `folder`. On failure, move `old` back."""
    if not folder.exists():
        os.rename(stage, folder)
        return
    os.rename(folder, old)
    try:
        os.rename(stage, folder)
    except OSError:
        os.rename(old, folder)
        raise


def _check_autoencoder_fits(source: Path, manifest: BundleManifest, config: AutoencoderConfig) -> None:
    if config.latent_channels != manifest.latent.channels:
        raise BundleError(
            f"{source}: the autoencoder has {config.latent_channels} latent channels, "
            f"but latent.channels is {manifest.latent.channels}"
        )
    if config.downscale != manifest.autoencoder.downscale:
        raise BundleError(
            f"{source}: the autoencoder scales down by {config.downscale}, "
            f"but autoencoder.downscale is {manifest.autoencoder.downscale}"
        )
    if manifest.latent.height % config.cell or manifest.latent.width % config.cell:
        raise BundleError(f"{source}: the autoencoder needs latents whose sides are multiples of {config.cell}")

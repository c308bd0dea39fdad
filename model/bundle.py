"""A model bundle: one folder with weights, their description and an autoencoder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from model.autoencoder_config import AUTOENCODERS, CONFIG, AutoencoderConfig
from model.errors import BundleError
from model.manifest import BundleManifest, Network
from model.networks import build_network
from model.weights import Shape, check_shapes, load_weights, show, write_weights

__all__ = ["Bundle", "BundleManifest", "explain", "list_bundles", "load_weights", "open_bundle"]
__all__ += ["network_shapes", "read_autoencoder_config", "read_manifest", "write_bundle", "write_manifest"]
__all__ += ["write_streamed_bundle"]

MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder"
AUTOENCODER_CONFIG = "config.json"
AUTOENCODER_WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_JSON = 8 << 20


@dataclass(frozen=True)
class Bundle:
    """A folder that was found complete, and what its bundle.json says."""

    folder: Path
    manifest: BundleManifest

    @property
    def name(self) -> str:
        """The name it is served under."""
        return self.manifest.name

    @property
    def weights(self) -> Path:
        """The network's safetensors file, for `load_weights`."""
        return self.folder / WEIGHTS

    @property
    def autoencoder(self) -> Path:
        """The autoencoder's folder, in the diffusers format."""
        return self.folder / AUTOENCODER


def list_bundles(root: Path) -> list[Bundle]:
    """The bundles in ``root``'s subfolders, by name.

    Hidden folders and those without a bundle.json are passed over. Raises BundleError if ``root`` is no folder,
    if a bundle is broken, lies behind a link that leads out of ``root``, or has the name of another.
    """
    if not root.is_dir():
        raise BundleError(f"{root}: no such folder of bundles")
    found: dict[str, Bundle] = {}
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not (folder / MANIFEST).exists():
            continue
        _require_inside(root, folder)
        bundle = open_bundle(folder)
        if bundle.name in found:
            raise BundleError(f"{folder}: is named {bundle.name}, as is {found[bundle.name].folder}; rename one")
        found[bundle.name] = bundle
    return [found[name] for name in sorted(found)]


def open_bundle(folder: Path) -> Bundle:
    """The bundle in ``folder``, its files all there and agreeing; weights are not read. Raises BundleError."""
    manifest = read_manifest(folder)
    _file_in(folder, WEIGHTS)
    autoencoder = read_autoencoder_config(folder / AUTOENCODER)
    for name in (AUTOENCODER_CONFIG, AUTOENCODER_WEIGHTS):
        _file_in(folder, f"{AUTOENCODER}/{name}")
    _check_autoencoder_fits(folder, manifest, autoencoder)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> BundleManifest:
    """What ``folder``'s bundle.json says; BundleError names the file and the field at fault."""
    path = _file_in(folder, MANIFEST)
    try:
        return BundleManifest.model_validate_json(_read_json(path))
    except ValidationError as error:
        raise BundleError(f"{path}: {explain(error)}") from error


def read_autoencoder_config(folder: Path) -> AutoencoderConfig:
    """Check a diffusers autoencoder folder: config.json and safetensors weights. Raises BundleError."""
    path = _file_in(folder, AUTOENCODER_CONFIG)
    if not (folder / AUTOENCODER_WEIGHTS).is_file():
        pickles = sorted(file.name for suffix in ("bin", "ckpt", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
        found = f"; {pickles[0]} is a pickle, which could run code and is never loaded" if pickles else ""
        raise BundleError(f"{folder}: no {AUTOENCODER_WEIGHTS}{found}. Bring the autoencoder's safetensors weights")
    try:
        return CONFIG.validate_json(_read_json(path))
    except ValidationError as error:
        raise BundleError(f"{path}: {explain(error)}") from error


def network_shapes(network: Network) -> dict[str, Shape]:
    """Name and shape of every weight of a network, for `load_weights`; allocates none of them."""
    with torch.device("meta"):
        built = build_network(network)
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def write_bundle(
    folder: Path,
    manifest: BundleManifest,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    autoencoder: Path | None = None,
) -> None:
    """Write or replace the bundle in ``folder``; it is written beside it and then renamed, so no reader sees half.

    ``autoencoder`` is a diffusers folder to copy; None keeps the one of the bundle replaced. ``dtype`` is float32,
    float16 or bfloat16; small tensors stay float32. Raises BundleError if the parts do not fit, if weights are
    not finite, or if ``folder`` holds anything but a bundle.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    write_streamed_bundle(folder, manifest, shapes, state_dict.__getitem__, dtype, autoencoder=autoencoder)


def write_streamed_bundle(
    folder: Path,
    manifest: BundleManifest,
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    autoencoder: Path | None = None,
) -> None:
    """`write_bundle` for weights too large to hold at once: ``read(name)`` gives one tensor of ``shapes``."""
    folder = folder.absolute()
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: exists and is no bundle; name a new folder")
    check_shapes(str(folder), shapes, network_shapes(manifest.network))
    source = autoencoder if autoencoder is not None else folder / AUTOENCODER
    _check_autoencoder_fits(source, manifest, read_autoencoder_config(source))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            stage = Path(scratch) / "new"
            (stage / AUTOENCODER).mkdir(parents=True)
            for name in (AUTOENCODER_CONFIG, AUTOENCODER_WEIGHTS):
                shutil.copyfile(source / name, stage / AUTOENCODER / name)
            write_weights(stage / WEIGHTS, shapes, read, dtype)
            (stage / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
            read_manifest(stage)
            _put_in_place(stage, folder, Path(scratch) / "old")
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error}") from error


def write_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Replace ``folder``'s bundle.json, in one rename. Raises BundleError if ``folder`` holds no bundle."""
    path = _file_in(folder, MANIFEST)
    new = path.with_suffix(".new")
    new.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _put_in_place(stage: Path, folder: Path, old: Path) -> None:
    """Rename ``stage`` to ``folder``, moving what stood there to ``old``; on failure it is moved back."""
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
            f"latent.channels says {manifest.latent.channels}"
        )
    if config.downscale != manifest.autoencoder.downscale:
        raise BundleError(
            f"{source}: the autoencoder scales down by {config.downscale}, "
            f"autoencoder.downscale says {manifest.autoencoder.downscale}"
        )


def _file_in(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder``; BundleError if it is missing or a link leads out of the folder."""
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path}: no such file")
    _require_inside(folder, path)
    return path


def _require_inside(folder: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: a link that leads out of {folder}; put the files themselves there")


def _read_json(path: Path) -> bytes:
    """The bytes of a JSON file of bounded size; the schema that reads them checks the rest."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise BundleError(f"{path}: more than {MAX_JSON:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def explain(error: ValidationError) -> str:
    """What a schema found: ``network.config.depth: Input should be …``, and how many problems more."""
    problems = error.errors(include_url=False, include_context=False)
    first, more = problems[0], len(problems) - 1
    # Pydantic inserts a union's tag, which is no field: below `network`, and at the root of an autoencoder's config.
    location = [str(part) for part in first["loc"]]
    tag = 1 if location[:1] == ["network"] else 0 if location[:1] and location[0] in AUTOENCODERS else None
    place = [part for index, part in enumerate(location) if index != tag]
    message = first["msg"].removeprefix("Value error, ")
    named = f"{'.'.join(place)}: {message}" if place else message
    return show(named, 500) + (f" (and {more} more)" if more else "")

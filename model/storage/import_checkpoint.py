"""Turn a `.ckpt` in the paper's format and local folders into a bundle. Nothing in the pickle is executed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from patchforge.model.errors import BundleError
from patchforge.model.storage.autoencoder_config import AutoencoderConfig
from patchforge.model.storage.bundle import (
    load_autoencoder_weights,
    network_shapes,
    read_autoencoder_config,
    write_streamed_bundle,
)
from patchforge.model.storage.checkpoint import (
    Checkpoint,
    Progress,
    infer_class_config,
    infer_text_config,
    read_checkpoint,
)
from patchforge.model.storage.encoder_folder import TOKENS, read_encoder_folder
from patchforge.model.storage.files import explain_error, hash_file
from patchforge.model.storage.manifest import (
    BundleManifest,
    ClassNetwork,
    Defaults,
    FolderEncoder,
    Network,
    SamplerChoice,
    TextNetwork,
)
from patchforge.model.storage.torch_archive import TorchArchive
from patchforge.model.storage.weights import check_shapes, printable

LICENCE = "non-commercial research (as the released checkpoint)"
TEXT_LICENCE = "unknown (imported text-to-image checkpoint)"
"""None was released: whoever trained the weights decides, with whoever's code and pictures they used."""
DUAL_LOOP = SamplerChoice.model_validate({"name": "dual_loop", "quantile": 0.4, "inner_steps": 4})
DEFAULTS = Defaults(sampler=DUAL_LOOP, steps=30, guidance=2.0)
TEXT_DEFAULTS = Defaults(sampler=DUAL_LOOP, steps=30, guidance=4.0)
SIZE = 256
"""Pixels along each side of what text-to-image networks draw; the weights fit every size."""
MAX_CLASS_NAMES = 8 << 20
IMAGENET = Path("imagenet")
"""Stands for `IMAGENET_NAMES` where a file of class names is asked for."""
IMAGENET_NAMES = Path(__file__).parents[1] / "class_names" / "imagenet.txt"
ENCODER = "text_encoder"
"""Folder of a text encoder in a bundle."""


def import_checkpoint(
    ckpt: Path,
    autoencoder: Path,
    out: Path,
    *,
    text_encoder: Path | None = None,
    max_tokens: int | None = None,
    size: int = SIZE,
    name: str | None = None,
    class_names: Path | None = None,
    licence: str | None = None,
    num_heads: int | None = None,
    defaults: Defaults | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda message: None,
) -> BundleManifest:
    """Write the bundle `out` from a checkpoint in the paper's format, with one tensor in memory at a time.

    Args:
        ckpt: a torch.save archive of `{"config": …, "state_dict": …}`, or of a training run.
        autoencoder: a diffusers folder with safetensors weights; it is copied.
        out: the bundle's folder.
        text_encoder: the folder of a text-to-image network's encoder. One beside `out` is shared, another is copied.
        max_tokens: tokens of a padded text; default: as the paper's code pads for this kind of encoder.
        size: pixels along each side, for text-to-image networks.
        name: the model's name for requests; default: made from `out`'s name.
        class_names: a UTF-8 file with one class per line, its names separated by commas, or `imagenet`; default: the
            numbers from 0.
        licence: the licence of the weights; default: `LICENCE` or `TEXT_LICENCE`.
        num_heads: needed if the config does not say it and the width is not a released one.
        defaults: values for requests that do not choose; default: `DEFAULTS` or `TEXT_DEFAULTS`.
        dtype: type of the stored weights.
        progress: called with a message for each step, each inferred value and each contradiction.

    Returns:
        The new bundle's manifest.

    Raises:
        BundleError: a file is missing, damaged or refused; the message names the file and the reason.
    """
    progress(f"checking the autoencoder {autoencoder}")
    decoder = read_autoencoder_config(autoencoder)
    load_autoencoder_weights(autoencoder)
    progress(f"reading {ckpt}; nothing in it is executed")
    with TorchArchive(ckpt) as archive:
        checkpoint = read_checkpoint(archive.read_tree(), str(ckpt), progress)
        by_text = checkpoint.kind == "text"
        network: Network
        if by_text:
            side = _latent_side(size, decoder)
            network = TextNetwork(config=infer_text_config(checkpoint, str(ckpt), side, progress))
        else:
            network = ClassNetwork(config=infer_class_config(checkpoint, str(ckpt), num_heads, progress))
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
        check_shapes(str(ckpt), shapes, network_shapes(network))
        archive.check_storages(checkpoint.tensors)
        licence = licence or (TEXT_LICENCE if by_text else LICENCE)
        manifest = _make_manifest(
            str(ckpt),
            name=name or _make_name(out),
            description=f"Imported from {printable(ckpt.name)}",
            network=network,
            latent=_describe_latent(network, decoder),
            autoencoder={"downscale": decoder.downscale},
            text_encoder=_describe_encoder(checkpoint, text_encoder, max_tokens, out, str(ckpt)),
            class_names=_read_class_names(class_names, network, str(ckpt)),
            licence=licence,
            defaults=defaults or (TEXT_DEFAULTS if by_text else DEFAULTS),
            training={"source": printable(ckpt.name), "sha256": hash_file(ckpt), "target": checkpoint.target},
            created=max(0, int(ckpt.stat().st_mtime)),
        )

        def read(key: str) -> Tensor:
            return archive.read_tensor(checkpoint.tensors[key])

        millions = network.config.parameters / 1e6
        progress(f"writing {millions:.0f} million parameters in {len(shapes)} tensors to {out}")
        parts = {"autoencoder": autoencoder, "text_encoder": text_encoder}
        write_streamed_bundle(out, manifest, shapes, read, dtype, **parts)
    progress(f"wrote {out}; licence: {licence}")
    return manifest


def _latent_side(size: int, decoder: AutoencoderConfig) -> int:
    if size < 1 or size % decoder.downscale:
        raise BundleError(f"--size {size} is not a multiple of the {decoder.downscale} pixels of one latent")
    return size // decoder.downscale


def _describe_latent(network: Network, decoder: AutoencoderConfig) -> dict[str, object]:
    # Stable Diffusion's latents are (autoencoder latents − shift) · scale. A bundle writes that as mean and std.
    grid = network.config.grid
    return {
        "channels": grid.channels,
        "height": grid.rows * grid.size,
        "width": grid.columns * grid.size,
        "mean": [decoder.shift_factor or 0.0] * grid.channels,
        "std": [1 / decoder.latent_scale] * grid.channels,
    }


def _describe_encoder(
    checkpoint: Checkpoint, folder: Path | None, max_tokens: int | None, out: Path, source: str
) -> FolderEncoder | None:
    if checkpoint.kind == "class":
        if folder is not None:
            raise BundleError(f"{source}: a class-conditional network, which has no text encoder: leave it out")
        return None
    if folder is None:
        raise BundleError(f"{source}: a text-to-image network: give the folder of its text encoder, --text-encoder")
    found = read_encoder_folder(folder)
    beside = folder.absolute().parent == out.absolute().parent
    tokens = max_tokens or TOKENS[found.kind]
    try:
        return FolderEncoder(
            kind=found.kind,
            folder=f"../{folder.absolute().name}" if beside else ENCODER,
            width=found.width,
            max_tokens=tokens,
            sha256=found.sha256,
        )
    except ValidationError as error:
        raise BundleError(f"{folder}: cannot be described as a text encoder: {explain_error(error)}") from error


def _make_manifest(source: str, **fields: object) -> BundleManifest:
    try:
        return BundleManifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError(f"{source}: cannot be described as a bundle: {explain_error(error)}") from error


def _make_name(out: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", out.absolute().name.lower()).strip("-._")


def _read_class_names(path: Path | None, network: Network, source: str) -> tuple[str, ...]:
    if isinstance(network, TextNetwork):
        if path is not None:
            raise BundleError(f"{source}: a text-to-image network, which has no classes: leave out --class-names")
        return ()
    count = network.config.num_classes
    if path is None:
        return tuple(map(str, range(count)))
    if path == IMAGENET and not path.exists():
        path = IMAGENET_NAMES
    try:
        if path.stat().st_size > MAX_CLASS_NAMES:
            raise BundleError(f"{path}: more than {MAX_CLASS_NAMES:,} bytes of class names")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if len(names) != count:
        raise BundleError(f"{path}: {len(names)} class names (one per line), but the network has {count} classes")
    return names

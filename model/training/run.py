"""From a table of pictures to a bundle: what ``patchforge train`` does."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import ValidationError

from model.bundle import Bundle, explain, load_weights, network_shapes, write_bundle
from model.errors import DataError
from model.manifest import BundleManifest
from model.networks import build_network
from model.pft import PFT, PFTConfig
from model.pipeline import Pipeline
from model.text import MiniLM
from model.text_pft import TextPFT, TextPFTConfig
from model.training.conditions import ClassConditions, Conditions, TextConditions
from model.training.data import Pictures
from model.training.latents import encode_pictures, latent_scale
from model.training.loop import Recipe, Trainer

Kind = Literal["text", "class"]
MAX_TOKENS = 24
PATCH_SIZE = 2
GRID_SAMPLES = 24
DEFAULTS: dict[str, Any] = {
    "sampler": {"name": "adaptive", "tolerance": 0.2, "guidance_until": 0.6},
    "steps": 8,
    "guidance": 3.0,
}


@dataclass(frozen=True)
class Size:
    """Width and depth of a network; heads are 32 wide."""

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
) -> Path:
    """Train or go on training; keeps state, log, sample grids and the latest bundle in ``folder``.

    ``start`` is a bundle of this kind whose weights, sizes and autoencoder a new run begins with.
    Returns the bundle's folder.

    Raises:
        DataError: a class-conditional model was asked for, but the pictures have no classes; ``start`` does not
            fit; or the folder's state is of a network of other sizes.
    """
    if kind == "class" and len(pictures.class_names) < 2:
        raise DataError("a class-conditional model needs pictures in at least two class subfolders")
    shown = pictures.where(~pictures.held_out())
    own = folder / "autoencoder"
    if start is not None:
        autoencoder = unpack_autoencoder(start, own)
    elif own.exists():  # a run that began with a bundle stays in its latents, also when resumed without naming it
        autoencoder = own
    cache = folder.parent / "cache"
    latents = encode_pictures(shown.images, autoencoder, cache)
    torch.manual_seed(recipe.seed)
    if start is None:
        network = build(kind, latents.shape[1], latents.shape[-1], len(shown.class_names), size)
    else:
        network = load_network(start, kind, shown)
    conditions: Conditions = ClassConditions(shown) if kind == "class" else TextConditions(shown, MAX_TOKENS, cache)
    trainer = Trainer(network, latents, torch.from_numpy(shown.weights), conditions, recipe, folder)
    if start is not None:
        trainer.earlier_samples = samples_seen(start)
    bundle = folder / f"{folder.name}-bundle"

    def export(trainer: Trainer) -> None:
        export_bundle(trainer, kind, shown, autoencoder, bundle, licence)
        sample_grid(bundle, shown, folder / f"samples-{trainer.step:06d}.png")

    describe(trainer, kind, shown, autoencoder, bundle, licence)  # what cannot be exported is not worth training
    trainer.run(export)
    return bundle


def unpack_autoencoder(bundle: Bundle, folder: Path) -> Path:
    """A bundle's autoencoder as `train_autoencoder` writes one, so that training can go on in the same latents.

    Raises:
        DataError: the bundle does not say how its autoencoder was trained.
    """
    figures = bundle.manifest.training.get("autoencoder")
    if figures is None:
        raise DataError(f"{bundle.folder} was not trained here: its autoencoder's latent statistics are not recorded")
    shutil.copytree(bundle.autoencoder, folder, dirs_exist_ok=True)
    (folder / "latents.json").write_text(json.dumps(figures, indent=2) + "\n")
    return folder


def samples_seen(bundle: Bundle) -> int:
    """Pictures drawn in all the runs that led to a bundle."""
    record = bundle.manifest.training
    return sum(value for key in ("samples", "earlier_samples") if isinstance(value := record.get(key, 0), int))


def load_network(bundle: Bundle, kind: Kind, pictures: Pictures) -> PFT | TextPFT:
    """The trained network of a bundle, in float32.

    Raises:
        DataError: it is of the other kind, or of other classes than ``pictures`` has.
    """
    manifest = bundle.manifest
    if manifest.network.kind != kind or (kind == "class" and list(manifest.class_names) != pictures.class_names):
        raise DataError(f"{bundle.folder} is not a {kind} model of these pictures")
    network = build_network(manifest.network)
    network.load_state_dict(load_weights(bundle.weights, network_shapes(manifest.network), dtype=torch.float32))
    return network


def build(kind: Kind, channels: int, side: int, classes: int, size: Size) -> PFT | TextPFT:
    """An untrained network for latents of ``side`` × ``side``."""
    if kind == "class":
        return PFT(PFTConfig(channels, side, size.depth, size.width, PATCH_SIZE, size.width // 32, classes))
    return TextPFT(
        TextPFTConfig(
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
    )


def export_bundle(trainer: Trainer, kind: Kind, pictures: Pictures, autoencoder: Path, out: Path, licence: str) -> None:
    """Write the averaged weights as a float16 bundle."""
    manifest = describe(trainer, kind, pictures, autoencoder, out, licence)
    state = trainer.network.state_dict() | trainer.average.values
    write_bundle(out, manifest, state, torch.float16, autoencoder=autoencoder)


def describe(
    trainer: Trainer, kind: Kind, pictures: Pictures, autoencoder: Path, out: Path, licence: str
) -> BundleManifest:
    """The manifest of the bundle ``out``.

    Raises:
        DataError: a name or a class that no bundle may have.
    """
    network = trainer.network
    channels, height, width = network.grid.latent_shape
    scale = latent_scale(autoencoder)
    fields = {
        "name": out.name.removesuffix("-bundle"),
        "description": "Text-to-image" if kind == "text" else f"{len(pictures.class_names)} classes",
        "network": {"kind": kind, "config": asdict(network.config)},
        "latent": {
            "channels": channels,
            "height": height,
            "width": width,
            "mean": scale.mean,
            "std": scale.std,
        },
        "autoencoder": {"downscale": pictures.images.shape[1] // height},
        "text_encoder": {"kind": "minilm", "max_tokens": MAX_TOKENS, "mask_padding": True} if kind == "text" else None,
        "class_names": pictures.class_names if kind == "class" else [],
        "licence": licence,
        "defaults": DEFAULTS,
        "training": {
            "pictures": len(pictures),
            "steps": trainer.step,
            "samples": trainer.step * trainer.recipe.batch,
            "earlier_samples": trainer.earlier_samples,
            "device_seconds": round(trainer.seconds),
            "device": str(trainer.device),
            "recipe": asdict(trainer.recipe),
            "schedule": type(trainer.recipe.timesteps).__name__,
            "autoencoder": json.loads((autoencoder / "latents.json").read_text()),
        },
        "created": int(time.time()),
    }
    try:
        return BundleManifest.model_validate(fields)
    except ValidationError as error:
        raise DataError(f"no bundle can be made of this: {explain(error)}") from error


def sample_grid(bundle: Path, pictures: Pictures, out: Path, seed: int = 0) -> None:
    """A picture of ``GRID_SAMPLES`` samples above the real pictures of the same prompts or classes."""
    pipeline = Pipeline.open(bundle)
    weights, generator = torch.from_numpy(pictures.weights).double(), torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(weights, GRID_SAMPLES, len(weights) < GRID_SAMPLES, generator=generator).tolist()
    by_class = isinstance(pipeline.network, PFT)
    wanted = [pictures.class_names[pictures.classes[row]] if by_class else prompt_of(pictures, row) for row in chosen]
    conditions = [pipeline.condition_on(words) for words in wanted]
    made, _ = pipeline.generate(pipeline.default_sampler(), conditions, list(range(seed, seed + GRID_SAMPLES)))
    real = torch.from_numpy(pictures.images[chosen])
    per_row = GRID_SAMPLES // 2
    strips = [
        torch.cat(list(part), dim=1) for i in (0, per_row) for part in (made[i : i + per_row], real[i : i + per_row])
    ]
    Image.fromarray(torch.cat(strips).numpy()).save(out)


def prompt_of(pictures: Pictures, row: int) -> str:
    """The first of a picture's names, with its style word."""
    style = pictures.styles[row]
    return f"{pictures.captions[row][0]}, {style}" if style else pictures.captions[row][0]

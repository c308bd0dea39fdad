"""Exports a run: a bundle of the averaged weights, and a grid of samples above the real pictures."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from patchforge.model.errors import DataError
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import explain_error, write_bundle
from patchforge.model.storage.manifest import BundleManifest
from patchforge.model.training.data import Pictures
from patchforge.model.training.latents import LATENT_FIGURES, autoencoder_downscale, latent_scale
from patchforge.model.training.loop import Trainer

Kind = Literal["text", "class"]
MAX_TOKENS = 24
GRID_SAMPLES = 24
EXAMPLES = 8
"""Prompts in the bundle, for people who wonder what to ask for."""
DEFAULTS: dict[str, Any] = {
    "sampler": {"name": "adaptive", "tolerance": 0.2, "guidance_until": 0.6},
    "steps": 8,
    "guidance": 3.0,
}
SMALL_FIRST = DEFAULTS | {"sampler": DEFAULTS["sampler"] | {"small_until": 0.5}}
"""For models that are trained at half their size too."""


@dataclass(frozen=True)
class Drawn:
    """What an export needs from a table, so that the table itself can be freed."""

    count: int
    class_names: list[str]
    real: Tensor
    """`(GRID_SAMPLES, size, size, 3)` uint8: always the same pictures, drawn by weight."""
    prompts: list[str]
    classes: list[str]
    """With `prompts`: what to ask a model of either kind for, one per picture."""

    @classmethod
    def from_table(cls, pictures: Pictures, seed: int = 0) -> Drawn:
        """Draw the pictures of the sample grids."""
        weights, generator = torch.from_numpy(pictures.weights).double(), torch.Generator().manual_seed(seed)
        rows = torch.multinomial(weights, GRID_SAMPLES, len(weights) < GRID_SAMPLES, generator=generator).tolist()
        real = torch.from_numpy(pictures.images[rows])  # a copy
        prompts = [prompt_of(pictures, row) for row in rows]
        classes = [pictures.class_names[pictures.classes[row]] for row in rows]
        return cls(len(pictures), pictures.class_names, real, prompts, classes)


@dataclass(frozen=True)
class Export:
    """A bundle of one size, and the sample grids beside it."""

    out: Path
    drawn: Drawn
    kind: Kind
    autoencoder: Path
    licence: str

    def write(self, trainer: Trainer) -> None:
        """Write the averaged weights as a float16 bundle, and a grid of samples."""
        state = trainer.network.state_dict() | trainer.average.values
        write_bundle(self.out, self.manifest(trainer), state, torch.float16, autoencoder=self.autoencoder)
        self._draw_grid().save(self.out.parent / f"samples-{trainer.step:06d}-{self.drawn.real.shape[1]}.png")

    def manifest(self, trainer: Trainer) -> BundleManifest:
        """Describe the bundle.

        Raises:
            DataError: a name or class is not allowed in a bundle.
        """
        scale, downscale = latent_scale(self.autoencoder), autoencoder_downscale(self.autoencoder)
        side = self.drawn.real.shape[1] // downscale
        config = trainer.network.config.model_dump()
        if isinstance(trainer.network, TextPFT):
            config["image_size"] = side  # the weights serve every size that they were trained at
        by_text, classes = self.kind == "text", self.drawn.class_names
        sizes, half = self._smaller_sizes(trainer), self.drawn.real.shape[1] // 2
        fields = {
            "name": self.out.name.removesuffix("-bundle"),
            "description": "Text-to-image" if by_text else f"{len(classes)} classes",
            "network": {"kind": self.kind, "config": config},
            "latent": {
                "channels": scale.channels,
                "height": side,
                "width": side,
                "mean": scale.mean,
                "std": scale.std,
            },
            "autoencoder": {"downscale": downscale},
            "text_encoder": {"kind": "minilm", "max_tokens": MAX_TOKENS, "mask_padding": True} if by_text else None,
            "sizes": sizes,
            "class_names": [] if by_text else classes,
            "licence": self.licence,
            "defaults": SMALL_FIRST if (half, half) in sizes else DEFAULTS,
            "examples": list(dict.fromkeys(self.drawn.prompts if by_text else self.drawn.classes))[:EXAMPLES],
            "training": self._describe_run(trainer),
            "created": int(time.time()),
        }
        try:
            return BundleManifest.model_validate(fields)
        except ValidationError as error:
            raise DataError(f"this run cannot be exported as a bundle: {explain_error(error)}") from error

    def _smaller_sizes(self, trainer: Trainer) -> list[tuple[int, int]]:
        """Sizes in pixels, besides the bundle's own, at which the network was trained."""
        small = trainer.recipe.small
        if small is None or small.size >= self.drawn.real.shape[1] or self.kind == "class":
            return []  # a class-conditional bundle has one size: its checkpoint holds the positions of that size
        return [(small.size, small.size)]

    def _describe_run(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "pictures": self.drawn.count,
            "steps": trainer.step,
            "samples": trainer.samples,
            "earlier_samples": trainer.earlier_samples,
            "device_seconds": round(trainer.seconds),
            "device": str(trainer.device),
            "recipe": asdict(trainer.recipe),
            "schedule": type(trainer.recipe.timesteps).__name__,
            "autoencoder": json.loads((self.autoencoder / LATENT_FIGURES).read_text()),
        }

    def _draw_grid(self, seed: int = 0) -> Image.Image:
        """Draw `GRID_SAMPLES` samples, above the real pictures of the same prompts or classes."""
        pipeline = Pipeline.open(self.out)
        wanted = self.drawn.prompts if self.kind == "text" else self.drawn.classes
        conditions = [pipeline.condition_on(words) for words in wanted]
        made, _ = pipeline.sample(pipeline.default_sampler(), conditions, list(range(seed, seed + GRID_SAMPLES)))
        half = GRID_SAMPLES // 2
        strips = [
            torch.cat(list(part), dim=1) for at in (0, half) for part in (made[at:][:half], self.drawn.real[at:][:half])
        ]
        return Image.fromarray(torch.cat(strips).numpy())


def prompt_of(pictures: Pictures, row: int) -> str:
    """Return a picture's first name, with its style word."""
    style = pictures.styles[row]
    return f"{pictures.captions[row][0]}, {style}" if style else pictures.captions[row][0]

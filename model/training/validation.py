"""Measures the error on held-out pictures, now and then during a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from patchforge.model.training.conditions import Conditions
from patchforge.model.training.data import Pictures
from patchforge.model.training.latents import encode_pictures
from patchforge.model.training.loop import Trainer, at_grid
from patchforge.model.training.loss import interpolate, patch_forcing_loss

SHOWN = 96
"""Pictures to measure per part, evenly chosen."""
CHUNK = 8
MEASURED = 1000
"""Trained pictures whose variance is measured."""
LOG = "held-out.jsonl"


class Validation:
    """Writes one JSON line per measurement: the averaged weights' mean squared velocity error, by part and by size.

    All patches of a picture have one timestep. The timesteps of a part's pictures are spread evenly from 0 to 1; the
    figures ending in `_start` are errors at 0, where the caption alone tells what to draw: 0 if it tells all, 1 if the
    mean of the trained pictures is as good. Noise and captions are the same every time.
    """

    def __init__(
        self,
        table: Pictures,
        small: int | None,
        autoencoder: Path,
        cache: Path,
        conditions_of: Callable[[Pictures], Conditions],
    ) -> None:
        """`table` includes the held-out pictures. `small` is a smaller size to measure too, in pixels."""
        masks = {"trained": table.trained(), "concepts": table.held_out()}
        masks["combinations"] = table.held_out_combinations()
        self.parts: dict[str, tuple[Tensor, Conditions]] = {}
        for name, mask in masks.items():
            rows = np.flatnonzero(mask)
            if not len(rows):
                continue
            part = table.rows(rows[np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)])
            conditions = conditions_of(part)
            self.parts[name] = encode_pictures(part.images, autoencoder, cache), conditions
            if small is not None:
                latents = encode_pictures(part.resized(small).images, autoencoder, cache)
                self.parts[f"{name}_{small}"] = latents, conditions

    def write(self, trainer: Trainer) -> dict[str, float]:
        """Measure, and append a line to the run's file."""
        with averaged(trainer):
            found = {name: round(_measure_error(trainer, *part), 5) for name, part in self.parts.items()}
            for name, part in self.parts.items():
                start = _measure_error(trainer, *part, noise_only=True)
                found[f"{name}_start"] = round(start / self._variance(trainer, part[0]), 5)
        line = {"step": trainer.step, "samples": trainer.samples, "seconds": round(trainer.seconds)} | found
        with (trainer.folder / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")
        return found

    def _variance(self, trainer: Trainer, latents: Tensor) -> float:
        """Measure how much trained pictures of this size differ from their mean: of `MEASURED`, evenly chosen."""
        patches = latents.shape[-1] * latents.shape[-2] // trainer.full.grid.size**2
        native = next(each for each in (trainer.full, trainer.small) if each and each.grid.patches == patches)
        some = native.patches[:: max(1, len(native.patches) // MEASURED)]
        return (some - some.mean(dim=0)).square().mean().item()


@contextmanager
def averaged(trainer: Trainer) -> Iterator[nn.Module]:
    """Give the network its averaged weights inside this block."""
    own = {name: value.detach().clone() for name, value in trainer.network.named_parameters()}
    trainer.network.load_state_dict(trainer.average.values, strict=False)
    try:
        yield trainer.network
    finally:
        trainer.network.load_state_dict(own, strict=False)


@torch.no_grad()
def _measure_error(trainer: Trainer, latents: Tensor, conditions: Conditions, noise_only: bool = False) -> float:
    grid = trainer.grid_of(latents)
    total = 0.0
    with torch.random.fork_rng(), at_grid(trainer.network, grid):
        torch.manual_seed(0)
        clean = grid.patchify(latents)
        noise = torch.randn_like(clean)
        times = ((torch.arange(len(clean)) + 0.5) / len(clean))[torch.randperm(len(clean))]
        if noise_only:
            times = torch.zeros_like(times)
        times = times[:, None].expand(clean.shape[:2])
        noisy = interpolate(clean, noise, times)
        for rows in np.array_split(np.arange(len(clean)), -(-len(clean) // CHUNK)):
            now = [each[rows].to(trainer.device) for each in (noisy, times, clean - noise)]
            output = conditions.predict(trainer.network, rows, now[0], now[1], drop=0.0)
            total += patch_forcing_loss(output, now[2].flatten(0, 1)).flow.item() * len(rows)
    return total / len(clean)

"""Trains the picture autoencoder: `diffusers.AutoencoderTiny` on pixels that are folded into channels."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from patchforge.model.device import best_device, training_autocast
from patchforge.model.errors import DataError
from patchforge.model.training.autoencoder_loss import LookAlike, reconstruction_loss, sharpness_loss
from patchforge.model.training.data import PATCH_SIZE, Pictures, check_side
from patchforge.model.training.latents import latent_scale
from patchforge.model.training.optimiser import Muon
from patchforge.model.training.progress import progress_bar

STATE = "training"
"""Folder of the state needed to resume; removed at the end of training."""


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Sizes and learning rates. The defaults give 8 pixels per latent."""

    width: int = 48
    latent_channels: int = 6
    fold: int = 2
    """Pixels per cell, along each side. They become channels before the first layer, and pixels after the last."""
    encoder_blocks: tuple[int, ...] = (1, 1, 2)
    decoder_blocks: tuple[int, ...] = (6, 3, 1)
    """Blocks per level, the coarsest first. Without one at the finest level, pixels are a linear function of coarser
    features: outlines are blurred, or have teeth."""
    decoder_width: int | None = None
    """Width of the decoder. None: the same as `width`."""
    batch: int = 4
    crop: int = 128
    whole_share: float = 0.25
    """Share of samples that are whole pictures, shrunk to the crop's size, so that small pictures are learned too."""
    adam_rate: float = 2e-3
    muon_rate: float = 0.01
    """Learning rate of square kernels."""
    latent_noise: float = 0.05
    latent_penalty: float = 1e-4
    perceptual: float = 0.2
    """Weight of the EfficientNet features; 0 if its weights are not installed."""
    sharpness: float = 1.0
    """Weight of `sharpness_loss`."""
    steps: int = 12_000
    seed: int = 0
    save_every_seconds: float = 300

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.fold * 2 ** (len(self.encoder_blocks) - 1))


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderTiny:
    """Build an untrained autoencoder: folded `(b, 3·fold², h/fold, w/fold)` in [-1, 1] ↔ latents `(b, c, h/f, w/f)`."""
    levels, channels = len(recipe.encoder_blocks), 3 * recipe.fold**2
    return AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        encoder_block_out_channels=(recipe.width,) * levels,
        decoder_block_out_channels=(recipe.decoder_width or recipe.width,) * levels,
        num_encoder_blocks=recipe.encoder_blocks,
        num_decoder_blocks=recipe.decoder_blocks,
        latent_channels=recipe.latent_channels,
    )


class AutoencoderTrainer:
    """Trains on a table of pictures. Keeps its state in a folder, so that it can resume."""

    def __init__(
        self,
        pictures: Pictures,
        folder: Path,
        recipe: AutoencoderRecipe,
        minutes: float | None = None,
        decoder_of: Path | None = None,
    ) -> None:
        """Stops at `recipe.steps` or after `minutes`. The learning rates follow whichever comes first.

        `decoder_of` is the folder of a trained autoencoder. Its encoder stays as it is, and so do the latents that
        models were trained on. Only a decoder is trained further: its own, or one with the recipe's blocks that begins
        with its weights.

        Raises:
            DataError: `decoder_of` is no autoencoder for pictures folded like this.
        """
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.minutes = recipe, folder, minutes
        self.device = best_device()
        self.decoder_only = decoder_of is not None
        network = build_autoencoder(recipe) if decoder_of is None else _with_frozen_encoder(decoder_of, recipe)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.look_alike = LookAlike(self.device) if recipe.perceptual else None
        kernels, rest = split_kernels(self.network)
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.99)), recipe.adam_rate),
            (Muon(kernels, lr=recipe.muon_rate), recipe.muon_rate),
        ]
        self.pictures, self.trained = pictures, pictures.trained()
        self.rows = torch.from_numpy(np.flatnonzero(self.trained))
        self.weights = torch.from_numpy(pictures.weights[self.trained]).double()
        self.step, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """Finished share of the run, from 0 to 1."""
        spent = self.seconds / 60 / self.minutes if self.minutes else 0.0
        return max(self.step / self.recipe.steps, spent)

    def run(self) -> None:
        """Train to the end, starting from the folder's state. Log the held-out PSNR at every save."""
        self.begin()
        saved, running = time.monotonic(), None
        with progress_bar() as bar:
            task = bar.add_task("autoencoder", total=self.recipe.steps, completed=self.step, note="")
            while self.progress < 1:
                started = time.monotonic()
                loss = self.train_step()
                self.seconds += time.monotonic() - started
                running = loss if running is None else 0.98 * running + 0.02 * loss
                bar.update(task, completed=self.step, note=f"loss {running:.4f}")
                if time.monotonic() - saved > self.recipe.save_every_seconds:
                    self.save()
                    self._write_log(running)
                    saved = time.monotonic()

    def begin(self) -> None:
        """Load the folder's state. If there is none, prepare the untrained network."""
        if not self._load_state() and not self.decoder_only:
            self._widen_latents()

    def train_step(self) -> float:
        """Train on one batch, and return the loss."""
        recipe = self.recipe
        target = self._draw_batch().to(self.device, memory_format=torch.channels_last)
        with training_autocast(self.device):
            latents = self.network.encode(fold(target, recipe.fold)).latents
            noise = 0.0 if self.decoder_only else recipe.latent_noise
            noisy = latents + noise * torch.randn_like(latents)
            restored = unfold(self.network.decode(noisy).sample, recipe.fold).float()
        loss = reconstruction_loss(restored, target) + recipe.latent_penalty * latents.float().square().mean()
        # Only what is in its place can be made sharp: in a new network the weight rises in the second half of the run.
        sharpness = recipe.sharpness if self.decoder_only else recipe.sharpness * max(0.0, 2 * self.progress - 1)
        loss = loss + sharpness * sharpness_loss(restored, target)
        if self.look_alike is not None:
            loss = loss + recipe.perceptual * self.look_alike(restored, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        share = min(1.0, (self.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, self.progress)))
        for optimiser, rate in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return loss.item()

    def _draw_batch(self) -> Tensor:
        """Draw `(b, 3, crop, crop)` in [-1, 1]: crops, and some whole pictures of that size."""
        recipe = self.recipe
        picked = self.rows[torch.multinomial(self.weights, recipe.batch, replacement=True)].tolist()
        side = self.pictures.images.shape[1]
        crop = min(recipe.crop, side)
        parts = []
        for row in picked:
            image = to_signed(torch.from_numpy(self.pictures.images[row : row + 1]))
            if torch.rand(()) < recipe.whole_share:
                parts.append(F.interpolate(image, (crop, crop), mode="area"))
            else:
                top, left = torch.randint(side - crop + 1, (2,)).tolist()
                parts.append(image[..., top : top + crop, left : left + crop])
        return torch.cat(parts)

    @torch.no_grad()
    def _widen_latents(self) -> None:
        """Scale the encoder's last layer to a standard deviation of 1: initial latents are weaker than their noise."""
        latents = self.network.encode(fold(self._draw_batch().to(self.device), self.recipe.fold)).latents
        last = [each for each in self.network.encoder.modules() if isinstance(each, nn.Conv2d)][-1]
        for parameter in last.parameters():
            parameter.div_(latents.std())

    def _write_log(self, running: float) -> None:
        rows = np.flatnonzero(self.pictures.held_out())[:: max(1, int(self.pictures.held_out().sum()) // 40)]
        was = self.network.training
        psnr = reconstruction_psnr(self.network.eval(), self.pictures.images[rows], self.recipe.fold)
        self.network.train(was)
        line = {"step": self.step, "seconds": round(self.seconds), "loss": round(running, 5), "psnr": round(psnr, 2)}
        with (self.folder / STATE / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the whole state atomically."""
        state = {
            "network": self.network.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        path = self.folder / STATE / "state.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def _load_state(self) -> bool:
        path = self.folder / STATE / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise DataError(f"{path} is of an autoencoder of another size; use another --out: {error}") from error
        for (optimiser, _), kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        if (on_gpu := state.get("cuda_random")) is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(on_gpu.cpu())
        return True


def _with_frozen_encoder(folder: Path, recipe: AutoencoderRecipe) -> AutoencoderTiny:
    """Load an autoencoder whose decoder is trained further, with as many blocks as the recipe says.

    Raises:
        DataError: the folder holds none, or one for other folds or levels.
    """
    try:
        network = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a trained autoencoder: {error}") from error
    config = network.config
    if config["in_channels"] != 3 * recipe.fold**2:
        raise DataError(f"{folder} takes {config['in_channels']} channels, not {3 * recipe.fold**2}")
    blocks = tuple(config["num_decoder_blocks"])
    if len(blocks) != len(recipe.decoder_blocks):
        raise DataError(f"{folder} has {len(blocks)} levels, not {len(recipe.decoder_blocks)}")
    settings = {name: value for name, value in config.items() if name != "_name_or_path"}  # a path of this machine
    network = network.float()
    further = AutoencoderTiny.from_config({**settings, "num_decoder_blocks": recipe.decoder_blocks})
    further.encoder.load_state_dict(network.encoder.state_dict())
    further.encoder.requires_grad_(False)
    _copy_decoder(network, further)
    return further


def _copy_decoder(source: AutoencoderTiny, target: AutoencoderTiny) -> None:
    """Copy the weights of each level's first blocks and of its convolutions, as many as both decoders have."""
    for ours, theirs in zip(_decoder_levels(source), _decoder_levels(target), strict=True):
        for kind in ours:
            for one, other in zip(ours[kind], theirs[kind], strict=False):
                other.load_state_dict(one.state_dict())


def _decoder_levels(network: AutoencoderTiny) -> list[dict[bool, list[nn.Module]]]:
    """List the layers with weights, level by level: plain convolutions at True, blocks at False."""
    levels: list[dict[bool, list[nn.Module]]] = [{True: [], False: []}]
    for layer in network.decoder.layers:
        if isinstance(layer, nn.Upsample):
            levels.append({True: [], False: []})
        elif any(True for _ in layer.parameters()):
            levels[-1][isinstance(layer, nn.Conv2d)].append(layer)
    return levels


def train_autoencoder(
    pictures: Pictures,
    out: Path,
    recipe: AutoencoderRecipe,
    minutes: float | None = None,
    decoder_of: Path | None = None,
) -> float:
    """Train, then save to `out` in the diffusers format, with the latent statistics beside it.

    A stopped run continues where it was. `decoder_of` is as in `AutoencoderTrainer`. Returns the PSNR in dB on pictures
    of held-out concepts.

    Raises:
        DataError: the pictures have a size that no model can be trained on afterwards, or `decoder_of` does not fit.
    """
    check_side(pictures.images.shape[1], recipe.downscale * PATCH_SIZE, "the size of the pictures")
    trainer = AutoencoderTrainer(pictures, out, recipe, minutes, decoder_of)
    trainer.run()
    network = trainer.network.half().float().eval()  # stored in half precision, so measured like that
    psnr = reconstruction_psnr(network, pictures.images[pictures.held_out()], recipe.fold)
    if decoder_of is None:
        means, deviations = latent_statistics(network, pictures.images, trainer.rows.numpy(), recipe.fold)
        mean, std = means.tolist(), deviations.tolist()
    else:  # the latents stay, also if there are more pictures by now
        scale = latent_scale(decoder_of)
        mean, std = list(scale.mean), list(scale.std)
    network.half().save_pretrained(out)
    figures = {"mean": mean, "std": std, "held_out_psnr_db": round(psnr, 2), "steps": trainer.step}
    (out / "latents.json").write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(out / STATE, ignore_errors=True)
    return psnr


def split_kernels(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into kernels with as many inputs as outputs, and all others."""
    kernels: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in network.parameters():
        if not parameter.requires_grad:
            continue
        square = parameter.ndim == 4 and parameter.shape[0] == parameter.shape[1] and parameter.shape[2] > 1
        (kernels if square else rest).append(parameter)
    return kernels, rest


def to_signed(images: Tensor) -> Tensor:
    """`(b, h, w, 3)` uint8 → `(b, 3, h, w)` float in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def fold(pixels: Tensor, by: int) -> Tensor:
    """`(b, 3, h, w)` → `(b, 3·by², h/by, w/by)`."""
    return F.pixel_unshuffle(pixels, by) if by > 1 else pixels


def unfold(cells: Tensor, by: int) -> Tensor:
    """Inverse of `fold`."""
    return F.pixel_shuffle(cells, by) if by > 1 else cells


@torch.inference_mode()
def reconstruction_psnr(network: AutoencoderTiny, images: np.ndarray, by: int) -> float:
    """Mean PSNR in dB over `images` `(n, h, w, 3)` uint8. Every picture counts the same."""
    total = 0.0
    for target in _signed_chunks(network, (images[row : row + 8] for row in range(0, len(images), 8))):
        latents = network.encode(fold(target, by)).latents
        restored = unfold(network.decode(latents).sample, by).clamp(-1, 1)
        error = F.mse_loss(restored, target, reduction="none").mean(dim=(1, 2, 3))
        total += (10 * torch.log10(4 / error)).sum().item()
    return total / len(images)


@torch.inference_mode()
def latent_statistics(
    network: AutoencoderTiny, images: np.ndarray, rows: np.ndarray, by: int, sample: int = 1024
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per latent channel, `(c,)` each, from an even sample of `images[rows]`."""
    chosen = rows[:: max(1, len(rows) // sample)]
    chunks = (images[chosen[start : start + 8]] for start in range(0, len(chosen), 8))
    latents = torch.cat([network.encode(fold(each, by)).latents.cpu() for each in _signed_chunks(network, chunks)])
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


def _signed_chunks(network: AutoencoderTiny, chunks: Iterable[np.ndarray]) -> Iterator[Tensor]:
    device = next(network.parameters()).device
    for chunk in chunks:
        yield to_signed(torch.from_numpy(chunk)).to(device, memory_format=torch.channels_last)

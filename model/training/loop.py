"""The training loop of both networks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.device import best_device, training_autocast
from model.errors import DataError
from model.pft import PFT
from model.text_pft import TextPFT
from model.training.conditions import DROPOUT, Conditions
from model.training.loss import Loss, interpolate, patch_forcing_loss
from model.training.optimiser import MovingAverage, Muon, split_parameters
from model.training.progress import progress_bar
from model.training.timesteps import SCHEDULES, Schedule


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults suit a few million parameters and an hour of two cores."""

    steps: int = 8000
    minutes: float | None = None
    """Stop after this much training time, if it comes before ``steps``; the learning rate follows suit."""
    batch: int = 64
    muon_rate: float | None = 0.02
    """None: AdamW for the matrices too."""
    adam_rate: float = 1.5e-3
    warm_up: int = 150
    constant_share: float = 0.5
    average: float = 0.999
    clip: float = 1.0
    timesteps: Schedule = SCHEDULES["mixed"]
    seed: int = 0
    compile: bool = False
    save_every_seconds: float = 120
    sample_every: int = 1000

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        return max(step / self.steps, seconds / 60 / self.minutes if self.minutes else 0.0)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Share of the full learning rate: warm-up, constant, then linear down to 2 %."""
        decay = max(0.0, self.progress(step, seconds) - self.constant_share) / max(1e-9, 1 - self.constant_share)
        return min(1.0, (step + 1) / self.warm_up) * (1 - 0.98 * min(1.0, decay))


class Trainer:
    """Trains a network on latents held in memory and keeps its state in a folder, so that it can resume."""

    def __init__(
        self,
        network: PFT | TextPFT,
        latents: Tensor,
        weights: Tensor,
        conditions: Conditions,
        recipe: Recipe,
        folder: Path,
    ) -> None:
        """``latents`` is ``(n, c, h, w)`` normalised, ``weights`` ``(n,)`` how often each is drawn."""
        self.device = best_device()
        self.network = network.to(self.device)
        self.patches = network.grid.patchify(latents)
        self.weights = weights.double()
        self.conditions = conditions
        self.recipe = recipe
        self.folder = folder
        matrices, rest = split_parameters(network) if recipe.muon_rate is not None else ([], list(network.parameters()))
        self.muon = Muon(matrices, lr=recipe.muon_rate or 0.0)
        self.adam = torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = MovingAverage(network, recipe.average)
        self.step = 0
        self.seconds = 0.0
        self.earlier_samples = 0
        """Drawn by the runs whose weights this one began with; for the record."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        # Its own, so that whatever the schedule draws, pictures, noise and dropout come in the same order.
        self.times = torch.Generator().manual_seed(recipe.seed)
        if recipe.compile:
            torch._dynamo.config.recompile_limit = 64  # every layer is a variant of one function
            for block in network.blocks:
                block.compile()

    @property
    def finished(self) -> bool:
        """The recipe's steps or minutes are used up."""
        return self.recipe.progress(self.step, self.seconds) >= 1

    def run(self, sample: Callable[[Trainer], None] | None = None) -> None:
        """Train until `finished`, resuming where the folder's state left off; log one JSON line per 50 steps."""
        self.resume()
        recipe, running = self.recipe, None
        saved = time.monotonic()
        with progress_bar() as bar, (self.folder / "log.jsonl").open("a") as log:
            task = bar.add_task("training", total=recipe.steps, completed=self.step, note="")
            while not self.finished:
                started = time.monotonic()
                loss = self.train_step()
                self.seconds += time.monotonic() - started
                flow, nll = loss.flow.item(), loss.nll.item()
                running = flow if running is None else 0.98 * running + 0.02 * flow
                bar.update(task, completed=self.step, note=f"flow {running:.4f}  nll {nll:+.3f}")
                if self.step % 50 == 0:
                    line = {
                        "step": self.step,
                        "seconds": round(self.seconds, 1),
                        "flow": round(running, 5),
                        "nll": round(nll, 4),
                    }
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if time.monotonic() - saved > recipe.save_every_seconds or self.finished:
                    self.save()
                    saved = time.monotonic()
                if sample and self.step % recipe.sample_every == 0 and not self.finished:
                    self._show(sample)
        if sample:  # also where there was nothing left to train
            self._show(sample)

    def _show(self, sample: Callable[[Trainer], None]) -> None:
        """Sampling must not move the random numbers of training, or a resumed run would differ."""
        with torch.random.fork_rng():
            sample(self)

    def train_step(self) -> Loss:
        """One batch, one update."""
        recipe = self.recipe
        picked = torch.multinomial(self.weights, recipe.batch, replacement=True)
        clean = self.patches[picked].to(self.device)
        times = recipe.timesteps.sample(recipe.batch, clean.shape[1], self.times).to(self.device)
        noise = torch.randn_like(clean)
        noisy = interpolate(clean, noise, times)
        # At tens of patches plain matrix products beat the fused attention kernel's backward.
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with plain, training_autocast(self.device):
            output = self.conditions.predict(self.network, picked.numpy(), noisy, times, DROPOUT)
        # Of a fully clean patch the noise, so the velocity, cannot be known: it is context only.
        known = (times < 1).flatten().float()
        loss = patch_forcing_loss(output, (clean - noise).flatten(0, 1), known)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        for optimiser, rate in ((self.muon, recipe.muon_rate or 0.0), (self.adam, recipe.adam_rate)):
            optimiser.param_groups[0]["lr"] = rate * recipe.rate(self.step, self.seconds)
            optimiser.step()
            optimiser.zero_grad()
        self.average.update(self.network, self.step)
        self.step += 1
        return loss

    def save(self) -> None:
        """Write the whole state, atomically."""
        path = self.folder / "state.pt"
        state = {
            "network": self.network.state_dict(),
            "average": self.average.values,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "earlier_samples": self.earlier_samples,
            "random": torch.get_rng_state(),
            "times_random": self.times.get_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        (self.folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")

    def resume(self) -> None:
        """Take up the folder's state, if there is one.

        Raises:
            DataError: it is of a network of other sizes.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise DataError(f"{path} is of another network; give another --out, or its sizes: {error}") from error
        self.average.values = state["average"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.earlier_samples = state.get("earlier_samples", self.earlier_samples)
        torch.set_rng_state(state["random"].cpu())
        if "times_random" in state:  # not in states of earlier versions
            self.times.set_state(state["times_random"].cpu())
        if self.device.type == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu())

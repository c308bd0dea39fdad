"""The training loop of both networks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchforge.model.device import best_device, training_autocast
from patchforge.model.errors import DataError
from patchforge.model.networks.layers import patch_centres
from patchforge.model.networks.pft import PFT, position_table
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.training.conditions import DROPOUT, Conditions
from patchforge.model.training.loss import Loss, interpolate, patch_forcing_loss
from patchforge.model.training.optimiser import MovingAverage, Muon, split_parameters
from patchforge.model.training.progress import progress_bar
from patchforge.model.training.timesteps import SCHEDULES, Schedule
from patchforge.model.types import Grid

STATE = "state.pt"


@dataclass(frozen=True)
class Small:
    """How to train a smaller size too: first only this size, because its steps are cheap; later now and then."""

    size: int
    """Pixels per side."""
    batch: int = 16
    first_steps: int = 0
    """Number of first steps that use only this size."""
    share: float = 0.15
    """Share of the later steps that use this size."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The defaults suit a few million parameters and an hour on two cores."""

    steps: int = 8000
    minutes: float | None = None
    """Stop after this much training time, if that is before `steps`. The learning rate follows."""
    batch: int = 64
    muon_rate: float | None = 0.02
    """None: AdamW trains the matrices too."""
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
    small: Small | None = None
    """A smaller size to train too."""

    def progress(self, step: int, seconds: float) -> float:
        """Finished share of the run, by steps or by time: the larger of the two."""
        return max(step / self.steps, seconds / 60 / self.minutes if self.minutes else 0.0)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Share of the full learning rate: warm-up, then constant, then linear down to 2 %."""
        decay = max(0.0, self.progress(step, seconds) - self.constant_share) / max(1e-9, 1 - self.constant_share)
        return min(1.0, (step + 1) / self.warm_up) * (1 - 0.98 * min(1.0, decay))


@dataclass(frozen=True)
class Native:
    """One of the sizes that a network is trained at."""

    patches: Tensor
    """`(n, P, D)`, without noise."""
    grid: Grid
    batch: int
    timesteps: Schedule


class Trainer:
    """Trains a network on latents in memory. Keeps its state in a folder, so that it can resume."""

    def __init__(
        self,
        network: PFT | TextPFT,
        latents: Tensor,
        weights: Tensor,
        conditions: Conditions,
        recipe: Recipe,
        folder: Path,
        small_latents: Tensor | None = None,
    ) -> None:
        """`latents` `(n, c, h, w)` are normalised. `weights` `(n,)` say how often each is drawn.

        `small_latents` `(n, c, h', w')` are the same pictures in the size of `recipe.small`.
        """
        self.device = best_device()
        self.network = network.to(self.device)
        self.full = Native(network.grid.patchify(latents), network.grid, recipe.batch, recipe.timesteps)
        self.size = self.full
        """Loss of the latest step."""
        self.small: Native | None = None
        if recipe.small is not None and small_latents is not None:
            grid = _grid(network, small_latents)
            self.small = Native(grid.patchify(small_latents), grid, recipe.small.batch, recipe.timesteps)
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
        self.samples = 0
        self.earlier_samples = 0
        """Samples seen by earlier runs whose weights this run started from; for the record."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        # A generator of its own, so that pictures, noise and dropout come in the same order with every schedule.
        self.times = torch.Generator().manual_seed(recipe.seed)
        if recipe.compile:
            torch._dynamo.config.recompile_limit = 64  # all layers are variants of one function
            for block in network.blocks:
                block.compile()

    @property
    def finished(self) -> bool:
        """Whether the recipe's steps or minutes are used up."""
        return self.recipe.progress(self.step, self.seconds) >= 1

    def run(self, sample: Callable[[Trainer], None] | None = None) -> None:
        """Train until `finished`, starting from the folder's state. Log one JSON line per 50 steps."""
        self.resume()
        recipe = self.recipe
        running: dict[str, float] = {}
        saved = time.monotonic()
        with progress_bar() as bar, (self.folder / "log.jsonl").open("a") as log:
            task = bar.add_task("training", total=recipe.steps, completed=self.step, note="")
            while not self.finished:
                started = time.monotonic()
                loss = self.train_step()
                self.seconds += time.monotonic() - started
                flow, nll = loss.flow.item(), loss.nll.item()
                key = "flow" if self.size is self.full else "small_flow"
                running[key] = 0.98 * running.get(key, flow) + 0.02 * flow
                bar.update(task, completed=self.step, note=f"{key} {running[key]:.4f}  nll {nll:+.3f}")
                if self.step % 50 == 0:
                    line = {
                        "step": self.step,
                        "seconds": round(self.seconds, 1),
                        "samples": self.samples,
                        "nll": round(nll, 4),
                    } | {name: round(value, 5) for name, value in running.items()}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if time.monotonic() - saved > recipe.save_every_seconds or self.finished:
                    self.save()
                    saved = time.monotonic()
                if sample and self.step % recipe.sample_every == 0 and not self.finished:
                    self._draw_samples(sample)
        if sample:  # even if there was nothing left to train
            self._draw_samples(sample)

    def _draw_samples(self, sample: Callable[[Trainer], None]) -> None:
        """Draw samples without changing the random numbers of training; otherwise a resumed run would differ."""
        with torch.random.fork_rng():
            sample(self)

    def train_step(self) -> Loss:
        """Train on one batch."""
        recipe, size = self.recipe, self._next_size()
        self.size = size
        picked = torch.multinomial(self.weights, size.batch, replacement=True)
        clean = size.patches[picked].to(self.device)
        times = size.timesteps.sample(size.batch, clean.shape[1], self.times).to(self.device)
        noise = torch.randn_like(clean)
        noisy = interpolate(clean, noise, times)
        # For tens of patches, plain matrix products are faster than the backward pass of fused attention.
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with plain, training_autocast(self.device), at_grid(self.network, size.grid):
            output = self.conditions.predict(self.network, picked.numpy(), noisy, times, DROPOUT)
        # A patch without noise is context only: its noise, and so its velocity, cannot be known.
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
        self.samples += size.batch
        return loss

    def grid_of(self, latents: Tensor) -> Grid:
        """Return how latents `(…, c, h, w)` of any size are cut into this network's patches."""
        return _grid(self.network, latents)

    def _next_size(self) -> Native:
        small, plan = self.small, self.recipe.small
        if small is None or plan is None:
            return self.full
        alone = self.step < plan.first_steps
        return small if alone or torch.rand(()) < plan.share else self.full

    def save(self) -> None:
        """Write the whole state atomically."""
        path = self.folder / STATE
        state = {
            "network": self.network.state_dict(),
            "average": self.average.values,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "samples": self.samples,
            "earlier_samples": self.earlier_samples,
            "random": torch.get_rng_state(),
            "times_random": self.times.get_state(),
            "cuda_random": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        (self.folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")

    def resume(self) -> None:
        """Load the folder's state, if there is one.

        Raises:
            DataError: it belongs to a network of other sizes.
        """
        path = self.folder / STATE
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise DataError(f"{path} belongs to another network; use another --out, or its sizes: {error}") from error
        self.average.values = state["average"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.samples = state.get("samples", self.step * self.recipe.batch)
        self.earlier_samples = state.get("earlier_samples", self.earlier_samples)
        torch.set_rng_state(state["random"].cpu())
        if "times_random" in state:  # missing in states of earlier versions
            self.times.set_state(state["times_random"].cpu())
        if self.device.type == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu())


@contextmanager
def at_grid(network: PFT | TextPFT, grid: Grid) -> Iterator[None]:
    """Let a network work on another grid: its patches lie on the same canvas, whatever their number."""
    if grid == network.grid:
        yield
        return
    name = "centres" if isinstance(network, TextPFT) else "pos_embed"
    own: Tensor = getattr(network, name)
    if isinstance(network, TextPFT):
        positions = patch_centres(grid)
    else:
        positions = position_table(grid, network.config.hidden_size, network.grid)[None]
    setattr(network, name, positions.to(own.device))
    try:
        yield
    finally:
        setattr(network, name, own)


def _grid(network: PFT | TextPFT, latents: Tensor) -> Grid:
    rows, columns = (side // network.grid.size for side in latents.shape[-2:])
    return replace(network.grid, rows=rows, columns=columns)

"""Compare this implementation with golden vectors: outputs that a reference implementation computed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchforge.model.denoiser import Condition, Denoiser, Evaluation, Memory
from patchforge.model.errors import BundleError
from patchforge.model.guidance import Branch
from patchforge.model.networks.attention import Layout
from patchforge.model.networks.build import build_network
from patchforge.model.networks.config import ClassConfig, TextConfig
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.text_pft import TextPFT
from patchforge.model.samplers import make_sampler
from patchforge.model.storage.bundle import explain_error
from patchforge.model.training.loss import patch_forcing_loss
from patchforge.model.trajectory import Trajectory, run
from patchforge.model.types import Plan

OPTIONS = {"p": "quantile", "inner": "inner_steps", "ratio": "ratio", "steps": "steps", "cfg": "guidance"}
"""Words in a `sample.*` key, and the sampler options they stand for."""
INTEGERS = {"inner_steps", "steps"}
TOLERANCE = 2e-5
"""Largest relative `Difference` between two correct implementations in float32, on any processor."""


@dataclass(frozen=True)
class Difference:
    """How far one golden tensor is from ours: largest absolute difference ÷ largest absolute golden value."""

    key: str
    alone: float
    """Evaluated by itself."""
    packed: float | None = None
    """Evaluated in one pack with all other keys; None for losses, which are not packed."""

    @property
    def worst(self) -> float:
        """The larger of both; a NaN counts as infinite."""
        found = [self.alone, 0.0 if self.packed is None else self.packed]
        return max(math.inf if math.isnan(each) else each for each in found)


class Golden:
    """A golden file: weights, inputs and expected outputs. Its metadata holds the network's config."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            BundleError: it is not a golden file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                self.config: dict[str, Any] = json.loads((file.metadata() or {})["config"])
                self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.network = self._load_network()
            needed = ["in.x", "in.t", "out.velocity", "out.logvar"]
            needed += ["in.y"] if isinstance(self.network, PFT) else ["in.text", "in.null_text"]
            if missing := [key for key in needed if key not in self.tensors]:
                raise KeyError(", ".join(missing))
            self.x = self.tensors["in.x"]
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            reason = explain_error(error) if isinstance(error, ValidationError) else error
            raise BundleError(f"{path} is not a golden file: {reason}") from error
        self.grid = self.network.grid
        self.denoiser = Denoiser(self.network)

    def _load_network(self) -> PFT | TextPFT:
        kind = TextConfig if "txt_in_dim" in self.config else ClassConfig
        network = build_network(kind.model_validate(self.config))
        prefix = "model."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)})
        return network

    @torch.inference_mode()
    def conditions(self) -> list[Condition]:
        """The condition of each picture of the batch."""
        if isinstance(self.network, PFT):
            null = self.network.null_class
            return [{Branch.NULL: null, Branch.CONDITIONAL: label} for label in self.tensors["in.y"].tolist()]
        null_text = self.network.refine(self.tensors["in.null_text"])
        return [
            {Branch.NULL: null_text, Branch.CONDITIONAL: self.network.refine(text[None])}
            for text in self.tensors["in.text"]
        ]

    def trajectories(self, key: str) -> list[Trajectory]:
        """Start one run per picture of the sampler that a `sample.*` key names; every patch is evaluated each time.

        Raises:
            BundleError: the key names an unknown option.
        """
        name, options = parse_sample_key(key)
        if name == "dual_loop":
            options["exact"] = True
        sampler = make_sampler(name, self.grid, **options)
        noises = self.grid.patchify(self.x)
        return [Trajectory.begin(sampler, c, noise) for c, noise in zip(self.conditions(), noises, strict=True)]

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate a dense batch: `x` `(b, c, h, w)` at times `t` `(b, P)` → network output `(b, P, out)`."""
        values, times = self.grid.patchify(x).flatten(0, 1), t.flatten()
        batch, patches = t.shape
        if isinstance(self.network, PFT):
            labels = self.tensors["in.y"].repeat_interleave(patches)
            out = self.network(values, times, labels, None, Layout.dense(batch, patches, x.device))
        else:
            context = self.network.refine(self.tensors["in.text"])
            out = self.network(values, times, None, Layout.dense(batch, patches, x.device, context))
        return out.unflatten(0, (batch, patches))

    def evaluate(self, t: Tensor) -> Tensor:
        """Evaluate `in.x` at times `t` `(b, P)` through the denoiser → `(b, c + 1, h, w)`."""
        evaluations = []
        for latent, times, condition in zip(self.grid.patchify(self.x), t, self.conditions(), strict=True):
            distinct, index = times.unique(return_inverse=True)
            plan = Plan(latent, tuple(distinct.tolist()), index)
            evaluations.append(Evaluation(plan, condition, Memory()))
        found = self.denoiser.evaluate(evaluations)
        velocity = torch.stack([each.velocity for each in found]).unflatten(-1, (self.grid.size**2, -1))
        log_variance = torch.stack([each.log_variance for each in found]).unsqueeze(-1)
        return self.grid.unpatchify(torch.cat([velocity, log_variance], dim=-1).flatten(2))

    def latents(self, trajectories: list[Trajectory]) -> Tensor:
        """The latents that the runs reached, `(b, c, h, w)`."""
        return self.grid.unpatchify(torch.stack([each.state.x for each in trajectories]))


def parse_sample_key(key: str) -> tuple[str, dict[str, Any]]:
    """Read `sample.dual_loop.p0.4.inner4.steps6.cfg2.5` as the sampler's name and options.

    Raises:
        BundleError: the key names an unknown option.
    """
    _, name, rest = (*key.split(".", 2), "", "")[:3]
    options: dict[str, Any] = {}
    for word in re.split(r"\.(?=[a-z])", rest):
        match = re.fullmatch(r"([a-z_]+)([0-9.]+)", word)
        if match is None or match[1] not in OPTIONS:
            raise BundleError(f"{key}: cannot read {word!r}")
        option = OPTIONS[match[1]]
        options[option] = int(match[2]) if option in INTEGERS else float(match[2])
    return name, options


def verify(path: Path) -> Iterator[Difference]:
    """Compare every output of a golden file with this implementation, in float32 on the CPU.

    Every sample runs twice. First each key by itself, with the file's batch in one evaluation. Then all keys together,
    with each picture as a request of its own, so that one pack mixes samplers, step counts and guidance.

    Raises:
        BundleError: the file is not a golden file.
    """
    golden = Golden(path)
    yield from _verify_forward(golden)
    if "train.xt" in golden.tensors:
        yield from _verify_loss(golden)
    keys = sorted(key for key in golden.tensors if key.startswith("sample."))
    packed = {key: golden.trajectories(key) for key in keys}
    run(golden.denoiser, [each for runs in packed.values() for each in runs])
    for key in keys:
        alone = golden.trajectories(key)
        run(golden.denoiser, alone)
        expected = golden.tensors[key]
        yield Difference(key, *(measure_difference(golden.latents(runs), expected) for runs in (alone, packed[key])))


def measure_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference ÷ largest absolute value of `expected`.

    Rounding errors grow with the values, so one tolerance then suits small values and large ones.
    """
    size = expected.abs().max().item()
    return (found - expected).abs().max().item() / (size or 1.0)


def _verify_forward(golden: Golden) -> Iterator[Difference]:
    """Compare the dense batch, and the same pictures as plans with many times each, packed by the denoiser."""
    dense = golden.grid.unpatchify(golden.forward(golden.x, golden.tensors["in.t"]))
    packed = golden.evaluate(golden.tensors["in.t"])
    for key, part in (("out.velocity", slice(None, -1)), ("out.logvar", slice(-1, None))):
        expected = golden.tensors[key]
        yield Difference(key, *(measure_difference(found[:, part], expected) for found in (dense, packed)))


def _verify_loss(golden: Golden) -> Iterator[Difference]:
    output = golden.forward(golden.tensors["train.xt"], golden.tensors["train.t"]).flatten(0, 1)
    velocity = golden.grid.patchify(golden.tensors["train.ut"]).flatten(0, 1)
    loss = patch_forcing_loss(output, velocity)
    for key, found in (("train.flow_loss", loss.flow), ("train.uncertainty_nll", loss.nll)):
        yield Difference(key, measure_difference(found, golden.tensors[key]))

"""Muon for the blocks' matrices, AdamW for the rest, and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.device import has_fast_bf16


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton–Schulz iterations (Jordan et al., 2024).

    Takes matrices only, or none. An update has unit spectral norm, times √(rows/cols) for tall matrices.
    """

    def __init__(self, params: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__([{"params": params}], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update from the gradients at hand."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter.grad)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(average, group["momentum"]))
                stretch = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * stretch)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: quintic Newton–Schulz."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    if has_fast_bf16(matrix.device):
        x = x.bfloat16()
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the network's, refiner's and time mapping's blocks, everything else)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = "blocks." in name or "txt_refiner." in name
        # They start at zero and map few channels to many: Adam's per-entry scale suits them better.
        adaptive = "norm.linear" in name
        (matrices if inside and parameter.ndim == 2 and not adaptive else rest).append(parameter)
    return matrices, rest


class MovingAverage:
    """Exponential moving average of a network's parameters, with a warm-up so that early noise is forgotten."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the network's weights after optimiser step ``step`` (from 0)."""
        decay = min(self.decay, (step + 1) / (step + 10))
        parameters = dict(network.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [parameters[name] for name in self.values], 1 - decay)

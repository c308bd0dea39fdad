"""Muon for the blocks' matrices, AdamW for all other parameters, and the moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchforge.model.device import has_fast_bf16


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton–Schulz iterations (Jordan et al., 2024).

    For matrices, and for kernels as matrices with one row per output channel. The list may be empty. An update has
    unit spectral norm, times √(rows/cols) for tall matrices.
    """

    def __init__(self, params: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__([{"params": params}], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update from the current gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter.grad)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                matrix = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                update = orthogonalise(matrix).view_as(parameter)
                stretch = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * stretch)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that drives singular values towards 1 (Jordan et al., 2024)."""


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix: quintic Newton–Schulz."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    if has_fast_bf16(matrix.device):
        x = _iterate(x.bfloat16(), iterations).to(matrix.dtype)
    elif x.shape[1] >= 2 * x.shape[0]:
        x = _compute_factor(x @ x.T, iterations) @ x
    else:
        x = _iterate(x, iterations)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _iterate(x: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        x = _apply_polynomial(x @ x.T) @ x
    return x


def _compute_factor(gram: Tensor, iterations: int) -> Tensor:
    """Compute the product of all factors that `_iterate` multiplies a matrix by, from its Gram matrix alone.

    The factors are polynomials of that matrix, so they commute, and the long side is multiplied once instead of ten
    times. Squared singular values need more digits than bf16 has.
    """
    product: Tensor | None = None
    for iteration in range(iterations):
        factor = _apply_polynomial(gram)
        product = factor if product is None else factor @ product
        if iteration + 1 < iterations:
            gram = factor @ gram @ factor
    assert product is not None
    return product


def _apply_polynomial(gram: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into the matrices of all blocks (network, refiner, time mapping), and all others."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = "blocks." in name or "txt_refiner." in name
        # They start at zero and map few channels to many, so Adam's scale per entry suits them better.
        adaptive = "norm.linear" in name
        (matrices if inside and parameter.ndim == 2 and not adaptive else rest).append(parameter)
    return matrices, rest


class MovingAverage:
    """Exponential moving average of a network's parameters. A warm-up lets it forget the noisy start."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the network's weights after step `step`, counted from 0."""
        decay = min(self.decay, (step + 1) / (step + 10))
        parameters = dict(network.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [parameters[name] for name in self.values], 1 - decay)

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
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group["lr"], group["momentum"])

    def _update(self, parameters: list[nn.Parameter], rate: float, momentum: float) -> None:
        """Update parameters of one shape. Their matrices are small, so all together take less time than each alone."""
        matrices = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter.grad)
            average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
            matrices.append(parameter.grad.lerp(average, momentum).flatten(1))
        rows, columns = matrices[0].shape
        stretch = max(1.0, rows / columns) ** 0.5
        for parameter, update in zip(parameters, orthogonalise(torch.stack(matrices)), strict=True):
            parameter.add_(update.view_as(parameter), alpha=-rate * stretch)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that drives singular values towards 1 (Jordan et al., 2024)."""


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each of `(k, m, n)`: quintic Newton–Schulz."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if has_fast_bf16(matrices.device):
        x = _iterate(x.bfloat16(), iterations).to(matrices.dtype)
    elif x.shape[-1] >= 2 * x.shape[-2]:
        x = _compute_factor(x @ x.mT, iterations) @ x
    else:
        x = _iterate(x, iterations)
    return x.mT if tall else x


def _iterate(x: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        x = _apply_polynomial(x @ x.mT) @ x
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
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
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

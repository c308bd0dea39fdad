"""One network evaluation: dense as in the paper against packed active patches, in one run.

Weights are random, for only sizes decide how long an evaluation takes. The paper's form conditions every patch
by itself and computes every patch; its plain seconds are the baseline of every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.attention import Layout
from model.denoiser import Denoiser, Evaluation, Memory
from model.evaluation.sampler_bench import matmul_peak
from model.guidance import Branch, combine
from model.pft import PFT, PFTConfig
from model.types import Plan, Prediction

SIZES = {
    "PFT-B": PFTConfig(4, 32, 12, 768, 2, 12, 1000),
    "PFT-XL": PFTConfig(4, 32, 28, 1152, 2, 16, 1000),
}
"""Released sizes (spec §4), for 256×256 pictures."""
SHARES = (1.0, 0.6, 0.3, 0.1)
GUIDANCE = 2.0
PAPER = "dense as the paper"
DENSE = "all patches, one timestep"
CONTEXT = "all patches, two timesteps"
KEPT = "all patches, two timesteps, K/V kept"
TIMES = 0.3, 0.4


@dataclass(frozen=True)
class ForwardRow:
    """One way to evaluate one guided picture (null and conditional branch)."""

    size: str
    case: str
    active_share: float
    seconds: float
    """The best of all rounds."""
    ratio: float
    """Dense as the paper ÷ this; the median over rounds, in each of which both ran one after the other."""
    against_all: float
    """Our evaluation of all patches ÷ this, likewise."""
    difference: float
    """Largest, of velocity or log-variance, from the paper's form on the same latent and times.

    Exact for part of the patches too: the kept keys and values were made from that same latent.
    """
    gflop: float
    """Of the matrix products, attention included; counted while it runs."""
    floor_seconds: float
    """``gflop`` at the machine's matmul peak."""
    gflops: float
    """Achieved GFLOP/s."""
    peak_gflops: float


def bench_forward(size: str, config: PFTConfig, device: torch.device, rounds: int = 5) -> Iterator[ForwardRow]:
    """Every case once a round, in turn, so that whatever else the machine does hits all of them alike."""
    cases = _cases(random_network(config).to(device))
    peak = matmul_peak(device)
    gflop: dict[str, float] = {}
    differences: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name, _, _, _ in cases}
    with torch.inference_mode():
        for name, _, call, reference in cases:
            gflop[name] = _count(call)
            differences[name] = _difference(call(), reference())
        for _ in range(rounds):
            for name, _, call, _ in cases:
                seconds[name].append(_timed(call, device))
    for name, share, _, _ in cases:
        best = min(seconds[name])
        yield ForwardRow(
            size=size,
            case=name,
            active_share=share,
            seconds=best,
            ratio=_median_ratio(seconds[PAPER], seconds[name]),
            against_all=_median_ratio(seconds[DENSE], seconds[name]),
            difference=differences[name],
            gflop=gflop[name],
            floor_seconds=gflop[name] / peak,
            gflops=gflop[name] / best,
            peak_gflops=peak,
        )


def random_network(config: PFTConfig) -> PFT:
    """Every weight random: at its initialisation the network's output is zero, which would hide differences."""
    network = PFT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return network.eval()


Case = tuple[str, float, Callable[[], Prediction], Callable[[], Prediction]]
"""Name, share of active patches, the evaluation, and the paper's form of the same."""


def _cases(network: PFT) -> list[Case]:
    denoiser, grid = Denoiser(network), network.grid
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn((grid.patches, grid.values), generator=generator).to(denoiser.device)
    order = torch.randperm(grid.patches, generator=generator)
    ahead = (order < grid.patches * 0.4).long().to(denoiser.device)  # as if dual-loop had moved the easy 40 %
    none_ahead = torch.zeros_like(ahead)
    memory = Memory()

    def paper(index: Tensor, patches: Tensor | None = None) -> Callable[[], Prediction]:
        return lambda: _part(paper_evaluation(network, latent, torch.tensor(TIMES)[index.cpu()]), patches)

    def ours(plan: Plan) -> Callable[[], Prediction]:
        condition = {Branch.NULL: network.null_class, Branch.CONDITIONAL: 0}
        return lambda: denoiser.evaluate([Evaluation(plan, condition, memory)])[0]

    cases: list[Case] = [
        (PAPER, 1.0, paper(ahead), paper(ahead)),
        (DENSE, 1.0, ours(Plan(latent, TIMES[:1], guidance=GUIDANCE)), paper(none_ahead)),
        (CONTEXT, 1.0, ours(Plan(latent, TIMES, ahead, guidance=GUIDANCE)), paper(ahead)),
        (KEPT, 1.0, ours(Plan(latent, TIMES, ahead, guidance=GUIDANCE, keep=True)), paper(ahead)),
    ]
    for share in SHARES:
        some = order[: round(share * grid.patches)].sort().values.to(denoiser.device)
        plan = Plan(latent, TIMES, ahead[some], some, GUIDANCE, keep=True)
        cases.append((f"{share:.0%} of the patches", share, ours(plan), paper(ahead, some)))
    return cases


def paper_evaluation(network: PFT, latent: Tensor, times: Tensor) -> Prediction:
    """Null and conditional branch with the conditioning computed for each patch, whatever patches share.

    ``latent`` is ``(P, D)``, ``times`` ``(P,)``.
    """
    device = latent.device
    labels = torch.tensor([network.null_class, 0], device=device).repeat_interleave(latent.shape[0])
    layout = Layout.dense(2, latent.shape[0], device)
    output = network(latent.repeat(2, 1), times.to(device).repeat(2), labels, None, layout)
    null, conditional = output.chunk(2)
    plan = Plan(latent, (0.0,), guidance=GUIDANCE)
    return combine({Branch.NULL: null, Branch.CONDITIONAL: conditional}, plan, network.grid)


def _part(prediction: Prediction, patches: Tensor | None) -> Prediction:
    if patches is None:
        return prediction
    return Prediction(prediction.velocity[patches], prediction.conditional[patches], prediction.log_variance[patches])


def _difference(one: Prediction, other: Prediction) -> float:
    parts = ((one.velocity, other.velocity), (one.log_variance, other.log_variance))
    return max(float((a.float() - b.float()).abs().max()) for a, b in parts)


def _count(call: Callable[[], Prediction]) -> float:
    """GFLOP of a call; by plain attention, for the counter does not see into the fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / 1e9


def _timed(call: Callable[[], Prediction], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _median_ratio(baseline: list[float], seconds: list[float]) -> float:
    ratios = torch.tensor([a / b for a, b in zip(baseline, seconds, strict=True)])
    return float(ratios.median())

"""One network evaluation: the paper's dense form against packed active patches, in one run.

Weights are random, because only sizes decide how long an evaluation takes. The paper's form computes every patch, and a
condition for each patch. Its seconds are the baseline of every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchforge.model.denoiser import Denoiser, Evaluation, Memory
from patchforge.model.device import serving_dtype, synchronize
from patchforge.model.flops import matmul_peak
from patchforge.model.guidance import Branch, combine
from patchforge.model.networks.attention import Layout
from patchforge.model.networks.config import ClassConfig
from patchforge.model.networks.pft import PFT
from patchforge.model.parallel import here
from patchforge.model.types import Plan, Prediction

SIZES = {
    name: ClassConfig(in_channels=4, input_size=32, patch_size=2, num_classes=1000, **sizes)
    for name, sizes in (
        ("PFT-B", {"depth": 12, "hidden_size": 768, "num_heads": 12}),
        ("PFT-L", {"depth": 24, "hidden_size": 1024, "num_heads": 16}),
        ("PFT-XL", {"depth": 28, "hidden_size": 1152, "num_heads": 16}),
    )
}
"""Released sizes (spec §4), for pictures of 256×256 pixels."""
SHARES = (1.0, 0.6, 0.3, 0.1)
GUIDANCE = 2.0
PAPER = "dense as the paper"
DENSE = "all patches, one timestep"
CONTEXT = "all patches, two timesteps"
KEPT = "all patches, two timesteps, K/V kept"
TIMES = 0.3, 0.4


@dataclass(frozen=True)
class ForwardRow:
    """One way to evaluate one guided picture, in its null and conditional branch."""

    size: str
    case: str
    seconds: float
    """The best round."""
    ratio: float
    """Seconds of the paper's form ÷ seconds of this. Both run one after the other in each round; median over rounds."""
    against_all: float
    """Seconds of our evaluation of all patches ÷ seconds of this, likewise."""
    difference: float
    """Largest difference in velocity or log-variance from the paper's form, on the same latent and times.

    It is near zero also when only some patches are evaluated: the cached keys and values come from the same latent.
    """
    gflop: float
    """GFLOP of all matrix products, with attention; counted in a run."""
    floor_seconds: float
    """Seconds for `gflop` at the machine's peak for matrix products."""
    gflops: float
    """Achieved GFLOP/s."""
    peak_gflops: float


def bench_forward(size: str, config: ClassConfig, device: torch.device, rounds: int = 5) -> Iterator[ForwardRow]:
    """Time every case once per round, in turn, so that other load on the machine affects all cases equally."""
    cases = _list_cases(random_network(config).to(device))
    peak = matmul_peak(device, serving_dtype(device))
    gflop: dict[str, float] = {}
    differences: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    with torch.inference_mode():
        for name, call, reference in cases:
            gflop[name] = _count_gflop(call)
            differences[name] = _largest_difference(call(), reference())
        for _ in range(rounds):
            for name, call, _ in cases:
                seconds[name].append(_time_call(call, device))
    for name, _, _ in cases:
        best = min(seconds[name])
        yield ForwardRow(
            size=size,
            case=name,
            seconds=best,
            ratio=_median_ratio(seconds[PAPER], seconds[name]),
            against_all=_median_ratio(seconds[DENSE], seconds[name]),
            difference=differences[name],
            gflop=gflop[name],
            floor_seconds=gflop[name] / peak,
            gflops=gflop[name] / best,
            peak_gflops=peak,
        )


def random_network(config: ClassConfig) -> PFT:
    """Make a network with random weights. With initial weights its output is zero, which would hide differences."""
    network = PFT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return network.eval()


Case = tuple[str, Callable[[], Prediction], Callable[[], Prediction]]
"""Name, the evaluation, and the paper's form of the same evaluation."""


def _list_cases(network: PFT) -> list[Case]:
    denoiser, grid = Denoiser(network), network.grid
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn((grid.patches, grid.values), generator=generator).to(denoiser.device)
    order = torch.randperm(grid.patches, generator=generator)
    ahead = (order < grid.patches * 0.4).long().to(denoiser.device)  # as if dual-loop had moved the easy 40 % ahead
    none_ahead = torch.zeros_like(ahead)
    memory = Memory()

    def paper(index: Tensor, patches: Tensor | None = None) -> Callable[[], Prediction]:
        return lambda: _select_patches(paper_evaluation(network, latent, torch.tensor(TIMES)[index.cpu()]), patches)

    def ours(plan: Plan) -> Callable[[], Prediction]:
        condition = {Branch.NULL: network.null_class, Branch.CONDITIONAL: 0}
        return lambda: denoiser.evaluate([Evaluation(plan, condition, memory)])[0]

    cases: list[Case] = [
        (PAPER, paper(ahead), paper(ahead)),
        (DENSE, ours(Plan(latent, TIMES[:1], guidance=GUIDANCE)), paper(none_ahead)),
        (CONTEXT, ours(Plan(latent, TIMES, ahead, guidance=GUIDANCE)), paper(ahead)),
        (KEPT, ours(Plan(latent, TIMES, ahead, guidance=GUIDANCE, keep=True)), paper(ahead)),
    ]
    for share in SHARES:
        some = order[: round(share * grid.patches)].sort().values.to(denoiser.device)
        plan = Plan(latent, TIMES, ahead[some], some, GUIDANCE, keep=True)
        cases.append((f"{share:.0%} of the patches", ours(plan), paper(ahead, some)))
    return cases


def paper_evaluation(network: PFT, latent: Tensor, times: Tensor) -> Prediction:
    """Evaluate the null and the conditional branch in the paper's form: one condition per patch.

    `latent` is `(P, D)`, `times` `(P,)`.
    """
    device = latent.device
    labels = torch.tensor([network.null_class, 0], device=device).repeat_interleave(latent.shape[0])
    layout = Layout.dense(2, latent.shape[0], device)
    output = network(latent.repeat(2, 1), times.to(device).repeat(2), labels, None, layout)
    null, conditional = output.chunk(2)
    plan = Plan(latent, (0.0,), guidance=GUIDANCE)
    return combine({Branch.NULL: null, Branch.CONDITIONAL: conditional}, plan, network.grid)


def _select_patches(prediction: Prediction, patches: Tensor | None) -> Prediction:
    if patches is None:
        return prediction
    return Prediction(prediction.velocity[patches], prediction.conditional[patches], prediction.log_variance[patches])


def _largest_difference(one: Prediction, other: Prediction) -> float:
    parts = ((one.velocity, other.velocity), (one.log_variance, other.log_variance))
    return max(float((a.float() - b.float()).abs().max()) for a, b in parts)


def _count_gflop(call: Callable[[], Prediction]) -> float:
    """Count the GFLOP of a call. Plain attention, because the counter cannot see into the fused kernel."""
    with here(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / 1e9


def _time_call(call: Callable[[], Prediction], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def _median_ratio(baseline: list[float], seconds: list[float]) -> float:
    ratios = torch.tensor([a / b for a, b in zip(baseline, seconds, strict=True)])
    return float(ratios.median())

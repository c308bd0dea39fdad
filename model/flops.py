"""The floating-point operations of one patch evaluation, from the network's sizes, and how fast a device can be.

The count includes all matrix products, attention's two as well, at 2·m·n·k each. Like PyTorch's own counter, it leaves
out norms, activations and softmax; tests compare both counts. For a network of width d, with P patches in its grid,
D = p²·c values per patch and p²·(c + 1) outputs per patch:

- **attention over the grid**: one active patch meets P keys and P values, fresh or cached: 2·P·d twice;
- **class-conditional block** (spec §4): qkv 2·d·3d, projection 2·d², MLP 2·d·4d twice: 24·d²;
- **text-to-image block** (spec §5): qkv 2·d·3d, out 2·d², query and output of cross-attention 2·d² twice, SwiGLU
  2·d·6d + 2·3d·d: 30·d²; and attention to T text tokens: 2·T·d twice;
- **first and last layer**: 2·D·d and 2·d·p²(c + 1).

The count leaves out work that does not happen per patch: conditioning (once per distinct timestep in a pack) and the
text (once per prompt). So it grows linearly with the number of patches, and the work saved is the number of patches
saved times this count.
"""

from __future__ import annotations

import math
import time

import torch

from patchforge.model.device import synchronize
from patchforge.model.storage.manifest import BundleManifest, ClassNetwork


def patch_flops(manifest: BundleManifest) -> int:
    """Floating-point operations to evaluate one patch once, in one guidance branch."""
    network = manifest.network
    if isinstance(network, ClassNetwork):
        width, per_block, tokens = network.config.hidden_size, 24, 0
    else:
        width, per_block = network.config.hidden_dim, 30
        tokens = (
            manifest.text_encoder.max_tokens if manifest.text_encoder else 0
        )  # every prompt is padded to this length
    rows, columns = manifest.grid
    block = per_block * width**2 + 4 * (rows * columns + tokens) * width
    values = network.config.patch_size**2 * (2 * manifest.latent.channels + 1)
    return network.config.depth * block + 2 * width * values


EMULATED = 5.0
"""GFLOP/s of small products below which a processor is taken to emulate the type: large ones would take minutes."""


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Measure the GFLOP/s of a large matrix product in this type; of a small one, if the type is only emulated."""
    small = _product_rate(device, dtype, 256)
    return small if small < EMULATED else _product_rate(device, dtype, side)


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the best GFLOP/s of five matrix products `(side, side)` × `(side, side)`."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9

"""What one patch evaluation costs in floating-point operations, counted from a network's sizes.

Counted are matrix products, attention's two included, at 2·m·n·k each; norms, activations and softmax are left out, as
PyTorch's own counter does, against which the tests hold these formulas. A network of width d, with P patches in its
grid, D = p²·c values a patch and p²·(c + 1) outputs a patch:

- **attention over the grid**: one active patch meets all P keys, and as many values, fresh or cached: 2·P·d twice;
- **class-conditional block** (spec §4): qkv 2·d·3d, projection 2·d², MLP 2·d·4d twice: 24·d²;
- **text-to-image block** (spec §5): qkv 2·d·3d, out 2·d², the query and output of cross-attention 2·d² twice, SwiGLU
  2·d·6d + 2·3d·d: 30·d², and attention to T text tokens: 2·T·d twice;
- **ends**: in 2·D·d, out 2·d·p²(c + 1).

Left out is what is not done per patch: conditioning, made once per distinct timestep of a packed evaluation, and the
text, refined once per prompt. So the count is linear in patches, and work saved is patches saved times this.
"""

from __future__ import annotations

from model.manifest import BundleManifest, ClassNetwork


def patch_flops(manifest: BundleManifest) -> int:
    """Floating-point operations of one patch through the network once, in one guidance branch."""
    network = manifest.network
    if isinstance(network, ClassNetwork):
        width, per_block, tokens = network.config.hidden_size, 24, 0
    else:
        width, per_block = network.config.hidden_dim, 30
        tokens = manifest.text_encoder.max_tokens if manifest.text_encoder else 0  # prompts are padded to this
    rows, columns = manifest.grid
    block = per_block * width**2 + 4 * (rows * columns + tokens) * width
    values = network.config.patch_size**2 * (2 * manifest.latent.channels + 1)
    return network.config.depth * block + 2 * width * values

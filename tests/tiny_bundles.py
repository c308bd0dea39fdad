"""Two tiny bundles with random weights, written once per test run."""

from __future__ import annotations

from pathlib import Path

import torch

from patchforge.model.networks.build import build_network
from patchforge.model.storage.bundle import write_bundle
from patchforge.model.storage.manifest import BundleManifest

CLASS_SIZES = {
    "in_channels": 4,
    "input_size": 8,
    "depth": 2,
    "hidden_size": 32,
    "patch_size": 2,
    "num_heads": 2,
    "num_classes": 2,
}
TEXT_SIZES = {
    "in_dim": 4,
    "depth": 2,
    "hidden_dim": 32,
    "head_dim": 16,
    "mapping_dim": 16,
    "mapping_depth": 1,
    "patch_size": 2,
    "txt_in_dim": 384,
    "txt_refiner_dim": 16,
    "txt_refiner_head_dim": 8,
    "txt_refiner_depth": 1,
    "image_size": 8,
}


def write_tiny_bundles(root: Path) -> None:
    """Write `tiny-class` (classes cat and dog) and `tiny-text`. Both draw 32×32 pictures of noise.

    `tiny-text` draws 16×16 and 32×16 pictures too.
    """
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    stages = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    blocks = {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    AutoencoderTiny(**stages, **blocks).save_pretrained(root / ".autoencoder")
    for kind, sizes in (("class", CLASS_SIZES), ("text", TEXT_SIZES)):
        manifest = BundleManifest.model_validate(
            {
                "name": f"tiny-{kind}",
                "network": {"kind": kind, "config": sizes},
                "latent": {"channels": 4, "height": 8, "width": 8, "mean": [0.0] * 4, "std": [1.0] * 4},
                "autoencoder": {"downscale": 4},
                "text_encoder": {"kind": "minilm", "max_tokens": 8, "mask_padding": True} if kind == "text" else None,
                "sizes": [[16, 16], [32, 16]] if kind == "text" else [],
                "class_names": ["cat", "dog"] if kind == "class" else [],
                "licence": "none",
                "defaults": {"sampler": {"name": "dual_loop"}, "steps": 3, "guidance": 2.0},
                "created": 1,
            }
        )
        network = build_network(manifest.network.config)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                around = 4.0 if name.endswith("attn.scale") else 0.0
                parameter.copy_(around + 0.1 * torch.randn_like(parameter))
        write_bundle(root / f"tiny-{kind}", manifest, network.state_dict(), autoencoder=root / ".autoencoder")

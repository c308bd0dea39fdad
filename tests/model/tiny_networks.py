"""Small networks for tests. Every weight is random: with initial weights, many paths would give zero."""

import torch

from patchforge.model.denoiser import Condition, Denoiser
from patchforge.model.guidance import Branch
from patchforge.model.networks.attention import TextContext
from patchforge.model.networks.config import ClassConfig, TextConfig
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.text_pft import TextPFT


def class_network(side: int = 8, patch: int = 2, channels: int = 3) -> PFT:
    config = ClassConfig(
        in_channels=channels, input_size=side, depth=2, hidden_size=32, patch_size=patch, num_heads=2, num_classes=5
    )
    return randomised(PFT(config))


def text_network(side: int = 8, patch: int = 2, channels: int = 3) -> TextPFT:
    config = TextConfig(
        in_dim=channels,
        depth=2,
        hidden_dim=32,
        head_dim=16,
        mapping_dim=16,
        mapping_depth=1,
        patch_size=patch,
        txt_in_dim=12,
        txt_refiner_dim=16,
        txt_refiner_head_dim=8,
        txt_refiner_depth=1,
        image_size=side,
    )
    return randomised(TextPFT(config))


def randomised(network):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            around = 4.0 if name.endswith("attn.scale") else 0.0  # the attention's scale must be positive
            parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.15)
    return network.eval()


def denoisers() -> list[tuple[Denoiser, list[Condition]]]:
    """Both kinds of network, each with three conditions."""
    return [(Denoiser(class_network()), class_conditions()), text_denoiser()]


def class_conditions() -> list[Condition]:
    return [{Branch.NULL: 5, Branch.CONDITIONAL: label} for label in (0, 3, 4)]


def text_denoiser() -> tuple[Denoiser, list[Condition]]:
    network = text_network()
    conditions = text_conditions(network)  # before a denoiser converts the weights
    return Denoiser(network), conditions


@torch.inference_mode()
def text_conditions(network: TextPFT) -> list[Condition]:
    generator = torch.Generator().manual_seed(2)
    null: TextContext = network.refine(torch.randn(1, 6, 12, generator=generator))
    texts = [network.refine(torch.randn(1, 6, 12, generator=generator)) for _ in range(3)]
    return [{Branch.NULL: null, Branch.CONDITIONAL: text} for text in texts]

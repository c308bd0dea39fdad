"""Small random networks for tests: every weight random, so that no path is dead as it is at initialisation."""

import torch

from model.attention import TextContext
from model.denoiser import Condition, Denoiser
from model.guidance import Branch
from model.pft import PFT, PFTConfig
from model.text_pft import TextPFT, TextPFTConfig


def class_network(side: int = 8, patch: int = 2, channels: int = 3) -> PFT:
    return randomised(PFT(PFTConfig(channels, side, 2, 32, patch, 2, 5)))


def text_network(side: int = 8, patch: int = 2, channels: int = 3) -> TextPFT:
    return randomised(TextPFT(TextPFTConfig(channels, 2, 32, 16, 16, 1, patch, 12, 16, 8, 1, side)))


def randomised(network):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            around = 4.0 if name.endswith("attn.scale") else 0.0  # the attention's scale is positive
            parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.15)
    return network.eval()


def denoisers() -> list[tuple[Denoiser, list[Condition]]]:
    """Both kinds of network, each with three conditions."""
    return [(Denoiser(class_network()), class_conditions()), text_denoiser()]


def class_conditions() -> list[Condition]:
    return [{Branch.NULL: 5, Branch.CONDITIONAL: label} for label in (0, 3, 4)]


@torch.inference_mode()
def text_denoiser() -> tuple[Denoiser, list[Condition]]:
    network = text_network()
    generator = torch.Generator().manual_seed(2)
    null: TextContext = network.refine(torch.randn(1, 6, 12, generator=generator))
    texts = [network.refine(torch.randn(1, 6, 12, generator=generator)) for _ in range(3)]
    return Denoiser(network), [{Branch.NULL: null, Branch.CONDITIONAL: text} for text in texts]

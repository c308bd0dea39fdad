"""The network a manifest describes."""

from __future__ import annotations

from model.manifest import ClassNetwork, Network
from model.pft import PFT, PFTConfig
from model.text_pft import TextPFT, TextPFTConfig


def build_network(network: Network) -> PFT | TextPFT:
    """An untrained network of the sizes given."""
    if isinstance(network, ClassNetwork):
        return PFT(PFTConfig(**network.config.model_dump()))
    return TextPFT(TextPFTConfig(**network.config.model_dump()))

"""From a network's sizes to the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from patchforge.model.networks.config import ClassConfig, TextConfig
from patchforge.model.networks.layers import patch_centres
from patchforge.model.networks.pft import PFT
from patchforge.model.networks.text_pft import TextPFT


def build_network(config: ClassConfig | TextConfig) -> PFT | TextPFT:
    """Build an untrained network of these sizes, on the current default device."""
    return PFT(config) if isinstance(config, ClassConfig) else TextPFT(config)


def build_around(config: ClassConfig | TextConfig, weights: Mapping[str, Tensor]) -> PFT | TextPFT:
    """Build a network of these sizes that takes the weights themselves, and no memory beside them."""
    with torch.device("meta"):
        network = build_network(config)
    network.load_state_dict(weights, assign=True)
    if isinstance(network, TextPFT):
        network.centres = patch_centres(network.grid)  # the only part that is not stored
    return network

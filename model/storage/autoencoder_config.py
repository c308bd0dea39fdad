"""The schema of an autoencoder's `config.json`: every argument that diffusers gets, by name, type and range."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

Stages: TypeAlias = Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=8)]
Blocks: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, le=16)]], Field(min_length=1, max_length=8)]
DownBlocks: TypeAlias = list[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]]
UpBlocks: TypeAlias = list[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]]
Activation: TypeAlias = Literal["relu", "silu", "swish", "mish", "gelu"]
Upsampling: TypeAlias = Literal["nearest", "nearest-exact", "bilinear", "bicubic"]
Side: TypeAlias = Annotated[int, Field(ge=1, le=65_536)]


class _Config(BaseModel):
    """Fields of both kinds. Unknown fields are refused: diffusers might read them as code to load."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    diffusers_version: str | None = Field(None, alias="_diffusers_version")
    name_or_path: str | None = Field(None, alias="_name_or_path")
    latent_channels: int = Field(4, ge=1, le=128)
    force_upcast: bool | None = None

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments for the constructor of the diffusers class. Fields the file omits get the library's defaults."""
        return self.model_dump(exclude={"class_name", "diffusers_version", "name_or_path"}, exclude_unset=True)


class _StagedConfig(_Config):
    """Fields of autoencoders with a KL loss."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: DownBlocks = ["DownEncoderBlock2D"]
    up_block_types: UpBlocks = ["UpDecoderBlock2D"]
    block_out_channels: Stages = [64]
    layers_per_block: int = Field(1, ge=1, le=16)
    act_fn: Activation = "silu"
    norm_num_groups: int = Field(32, ge=1, le=4096)
    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        for name, stages in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            _require_same_length(name, stages, "block_out_channels", self.block_out_channels)
        _require_groups("block_out_channels", self.block_out_channels, self.norm_num_groups)
        return self

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    fold: ClassVar[int] = 1


class KLConfig(_StagedConfig):
    """Config of an AutoencoderKL, such as Stable Diffusion's. The defaults are the library's."""

    class_name: Literal["AutoencoderKL"] = Field(alias="_class_name")
    scaling_factor: float | None = Field(0.18215, gt=0)
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    cell: ClassVar[int] = 1

    @property
    def latent_scale(self) -> float:
        """Factor from the autoencoder's latents to the network's."""
        return self.scaling_factor or 0.18215


class Flux2Config(_StagedConfig):
    """Config of an AutoencoderKLFlux2. The defaults are the library's.

    Its weights hold the mean and variance of the latents, for each channel and place in a cell of 2×2.
    """

    class_name: Literal["AutoencoderKLFlux2"] = Field(alias="_class_name")
    down_block_types: DownBlocks = ["DownEncoderBlock2D"] * 4
    up_block_types: UpBlocks = ["UpDecoderBlock2D"] * 4
    block_out_channels: Stages = [128, 256, 512, 512]
    decoder_block_out_channels: Stages | None = None
    layers_per_block: int = Field(2, ge=1, le=16)
    latent_channels: int = Field(32, ge=1, le=128)
    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] = 1024
    batch_norm_eps: float = Field(1e-4, gt=0, le=1)
    batch_norm_momentum: float = Field(0.1, ge=0, le=1)
    patch_size: list[Literal[2]] = Field([2, 2], min_length=2, max_length=2)
    cell: ClassVar[int] = 2
    latent_scale: ClassVar[float] = 1.0
    shift_factor: ClassVar[float] = 0.0

    @model_validator(mode="after")
    def _check_decoder(self) -> Self:
        decoder = self.decoder_block_out_channels
        if decoder is not None:
            _require_same_length("decoder_block_out_channels", decoder, "block_out_channels", self.block_out_channels)
            _require_groups("decoder_block_out_channels", decoder, self.norm_num_groups)
        return self


class TinyConfig(_Config):
    """Config of an AutoencoderTiny, such as TAESD or our own. The defaults are the library's."""

    class_name: Literal["AutoencoderTiny"] = Field(alias="_class_name")
    in_channels: Literal[3, 12, 48] = 3
    out_channels: Literal[3, 12, 48] = 3
    """12: of pictures folded by 2, so that nothing runs at full resolution; 48: by 4."""
    encoder_block_out_channels: Stages = [64] * 4
    decoder_block_out_channels: Stages = [64] * 4
    block_out_channels: Stages | None = None
    act_fn: Activation = "relu"
    upsample_fn: Upsampling = "nearest"
    upsampling_scaling_factor: Literal[2] = 2
    num_encoder_blocks: Blocks = [1, 3, 3, 3]
    num_decoder_blocks: Blocks = [3, 3, 3, 1]
    latent_magnitude: float = Field(3, gt=0)
    latent_shift: float = 0.5
    scaling_factor: float | None = Field(1.0, gt=0)
    shift_factor: float | None = 0.0
    cell: ClassVar[int] = 1

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        encoder, decoder = self.encoder_block_out_channels, self.decoder_block_out_channels
        _require_same_length("num_encoder_blocks", self.num_encoder_blocks, "encoder_block_out_channels", encoder)
        _require_same_length("num_decoder_blocks", self.num_decoder_blocks, "decoder_block_out_channels", decoder)
        _require_same_length("decoder_block_out_channels", decoder, "encoder_block_out_channels", encoder)
        if self.in_channels != self.out_channels:
            raise ValueError("out_channels must equal in_channels")
        for name, widths in (("encoder_block_out_channels", encoder), ("decoder_block_out_channels", decoder)):
            if len(set(widths)) > 1:
                raise ValueError(f"{name}: all stages must have the same width")
        return self

    @property
    def arguments(self) -> dict[str, object]:
        """As in the base class, without `block_out_channels`: the library writes that field but does not accept it."""
        return {name: value for name, value in super().arguments.items() if name != "block_out_channels"}

    @property
    def latent_scale(self) -> float:
        """Factor from the autoencoder's latents to the network's."""
        return self.scaling_factor or 1.0

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(self.fold * 2 ** (len(self.encoder_block_out_channels) - 1))

    @property
    def fold(self) -> int:
        """Pixels per cell of the network's input, along one side: outside of the network they are channels."""
        return math.isqrt(self.in_channels // 3)


AutoencoderConfig: TypeAlias = KLConfig | Flux2Config | TinyConfig
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny")

CONFIG: TypeAdapter[AutoencoderConfig] = TypeAdapter(Annotated[AutoencoderConfig, Field(discriminator="class_name")])


def _require_same_length(name: str, values: Sized, other: str, others: Sized) -> None:
    if len(values) != len(others):
        raise ValueError(f"{name} has {len(values)} entries, {other} has {len(others)}")


def _require_groups(name: str, widths: list[int], groups: int) -> None:
    for width in widths:
        if width % groups:
            raise ValueError(f"{name}: {width} is not a multiple of norm_num_groups")

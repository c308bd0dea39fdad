"""What an autoencoder's `config.json` may say: every argument diffusers would be given, by name, type and size."""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

Stages: TypeAlias = Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=8)]
Blocks: TypeAlias = Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1, max_length=8)]
DownBlocks: TypeAlias = list[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]]
UpBlocks: TypeAlias = list[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]]
Activation: TypeAlias = Literal["relu", "silu", "swish", "mish", "gelu"]
Upsampling: TypeAlias = Literal["nearest", "nearest-exact", "bilinear", "bicubic"]
Side: TypeAlias = Annotated[int, Field(ge=1, le=65_536)]


class _Config(BaseModel):
    """What both kinds have; fields the library does not know, or that mean code to it, are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    diffusers_version: str | None = Field(None, alias="_diffusers_version")
    name_or_path: str | None = Field(None, alias="_name_or_path")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: int = Field(4, ge=1, le=128)
    force_upcast: bool | None = None

    @property
    def arguments(self) -> dict[str, object]:
        """What the file says to the class's constructor; the rest is left to the library's defaults."""
        return self.model_dump(exclude={"class_name", "diffusers_version", "name_or_path"}, exclude_unset=True)


class KLConfig(_Config):
    """Of an AutoencoderKL, as Stable Diffusion's. Defaults are the library's."""

    class_name: Literal["AutoencoderKL"] = Field(alias="_class_name")
    down_block_types: DownBlocks = ["DownEncoderBlock2D"]
    up_block_types: UpBlocks = ["UpDecoderBlock2D"]
    block_out_channels: Stages = [64]
    layers_per_block: int = Field(1, ge=1, le=16)
    act_fn: Activation = "silu"
    norm_num_groups: int = Field(32, ge=1, le=4096)
    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] = 32
    scaling_factor: float | None = Field(0.18215, gt=0)
    shift_factor: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        for name, stages in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            _require_as_many(name, stages, "block_out_channels", self.block_out_channels)
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"block_out_channels: {width} is not a multiple of norm_num_groups")
        return self

    @property
    def latent_scale(self) -> float:
        """What networks' latents are multiplied by."""
        return self.scaling_factor or 0.18215

    @property
    def downscale(self) -> int:
        """Pixels on a side of one latent."""
        return int(2 ** (len(self.block_out_channels) - 1))


class TinyConfig(_Config):
    """Of an AutoencoderTiny, as TAESD and what `patchforge train autoencoder` writes. Defaults are the library's."""

    class_name: Literal["AutoencoderTiny"] = Field(alias="_class_name")
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

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        encoder, decoder = self.encoder_block_out_channels, self.decoder_block_out_channels
        _require_as_many("num_encoder_blocks", self.num_encoder_blocks, "encoder_block_out_channels", encoder)
        _require_as_many("num_decoder_blocks", self.num_decoder_blocks, "decoder_block_out_channels", decoder)
        _require_as_many("decoder_block_out_channels", decoder, "encoder_block_out_channels", encoder)
        for name, widths in (("encoder_block_out_channels", encoder), ("decoder_block_out_channels", decoder)):
            if len(set(widths)) > 1:
                raise ValueError(f"{name}: the library's stages fit together only where all are of one width")
        return self

    @property
    def arguments(self) -> dict[str, object]:
        """As for any; ``block_out_channels`` the library writes but does not take."""
        return {name: value for name, value in super().arguments.items() if name != "block_out_channels"}

    @property
    def latent_scale(self) -> float:
        """What networks' latents are multiplied by."""
        return self.scaling_factor or 1.0

    @property
    def downscale(self) -> int:
        """Pixels on a side of one latent."""
        return int(2 ** (len(self.encoder_block_out_channels) - 1))


AutoencoderConfig: TypeAlias = KLConfig | TinyConfig
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")

CONFIG: TypeAdapter[AutoencoderConfig] = TypeAdapter(Annotated[AutoencoderConfig, Field(discriminator="class_name")])


def _require_as_many(name: str, values: Sized, other: str, others: Sized) -> None:
    if len(values) != len(others):
        raise ValueError(f"{name} has {len(values)} entries, {other} has {len(others)}")

"""Autoencoders from diffusers are read. Anything that does not fit is refused before memory is allocated."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchforge.model.codec import ATTENTION_NAMES, Codec
from patchforge.model.errors import BundleError
from patchforge.model.storage.autoencoder_config import Flux2Config, KLConfig, TinyConfig
from patchforge.model.storage.bundle import open_bundle, read_autoencoder_config
from patchforge.model.storage.manifest import Latent
from tests.paper_files import write_autoencoder

LATENT = Latent(channels=4, height=4, width=4, mean=(0.0,) * 4, std=(1.0,) * 4)
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, autoencoder: Path) -> Path:
    """An AutoencoderKL that a test may change."""
    return Path(shutil.copytree(autoencoder, tmp_path / "autoencoder"))


def alter(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_it_decodes_and_encodes_as_the_library_does(folder: Path) -> None:
    codec, theirs = Codec(folder, LATENT, CPU), diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ((theirs.decode(latents).sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    pictures = codec.decode(latents)
    assert (pictures.int() - expected.int()).abs().max() <= 1
    with torch.inference_mode():
        encoded = theirs.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(codec.encode(pictures), encoded, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_what_is_decoded_with_it() -> None:
    bundle = open_bundle("emoji-text")
    codec = Codec(bundle.autoencoder, bundle.manifest.latent, CPU)
    latents = torch.randn(3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = [codec.decode(each[None]) for each in latents]
    assert torch.equal(codec.decode(latents), torch.cat(alone))


def test_attention_under_its_older_names_is_read(folder: Path) -> None:
    codec, weights = Codec(folder, LATENT, CPU), load_file(folder / WEIGHTS)
    for old, new in ATTENTION_NAMES.items():
        weights = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, folder / WEIGHTS)
    latents = torch.ones(1, 4, 4, 4)
    assert torch.equal(Codec(folder, LATENT, CPU).decode(latents), codec.decode(latents))


def test_latents_of_flux_2_are_normalised_by_channel_and_place_in_the_cell(tmp_path: Path) -> None:
    theirs = write_autoencoder(tmp_path, "AutoencoderKLFlux2")
    latent = Latent(channels=4, height=4, width=6, mean=(0.5,) * 4, std=(2.0,) * 4)
    codec = Codec(tmp_path, latent, CPU)
    pictures = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mean = theirs.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        cells = torch.stack([mean[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2).flatten(1, 2)
        norm = theirs.bn
        cells = (cells - norm.running_mean[:, None, None]) / (norm.running_var + 1e-4).sqrt()[:, None, None]
        expected = torch.empty_like(mean)
        for place, part in enumerate(cells.unflatten(1, (4, 4)).unbind(2)):
            expected[:, :, place // 2 :: 2, place % 2 :: 2] = part
    encoded = codec.encode(pictures)
    torch.testing.assert_close(encoded, (expected - 0.5) / 2, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        decoded = ((theirs.decode(mean).sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert (codec.decode(encoded).int() - decoded.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLFlux2"])
def test_large_pictures_are_decoded_and_encoded_in_tiles(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the picture is as if it were made at once; norms over a tile differ a little from those over all."""
    write_autoencoder(tmp_path, kind)
    whole = Codec(tmp_path, LATENT, CPU)
    monkeypatch.setattr("patchforge.model.codec.TILE", 16)
    tiled = Codec(tmp_path, LATENT, CPU)
    sizes: set[tuple[int, ...]] = set()
    watched = tiled.network.decoder
    watched.register_forward_pre_hook(lambda module, given: sizes.add(tuple(given[0].shape[-2:])))
    latents = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(0))
    at_once, in_tiles = whole.decode(latents), tiled.decode(latents)
    assert in_tiles.shape == at_once.shape == (1, 48, 80, 3)
    assert max(max(size) for size in sizes) == 16
    assert (in_tiles.float() - at_once.float()).abs().mean() < 10
    encoded = tiled.encode(in_tiles)
    assert encoded.shape == latents.shape
    assert (encoded - whole.encode(in_tiles)).abs().mean() < 0.5 * whole.encode(in_tiles).std()
    small = latents[..., :16, :16]
    assert torch.equal(tiled.decode(small), whole.decode(small))


@pytest.mark.parametrize("config", [KLConfig, Flux2Config, TinyConfig])
def test_every_argument_of_the_library_is_known_with_its_default(
    config: type[KLConfig | Flux2Config | TinyConfig],
) -> None:
    [class_name] = get_args(config.model_fields["class_name"].annotation)
    parameters = dict(inspect.signature(getattr(diffusers, class_name).__init__).parameters)
    del parameters["self"]
    fields = set(config.model_fields) - {"class_name", "diffusers_version", "name_or_path", "force_upcast"}
    assert fields - {"block_out_channels"} == parameters.keys() - {"force_upcast", "block_out_channels"}
    for name in fields & parameters.keys():
        default = parameters[name].default
        assert config.model_fields[name].default == (list(default) if isinstance(default, tuple) else default), name


def test_a_config_may_leave_all_to_the_library(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    config = read_autoencoder_config(folder)
    assert (config.arguments, config.downscale, config.latent_scale) == ({}, 1, 0.18215)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block_out_channels": [4096, 4096], "layers_per_block": 16}, "do not fit the network"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types has 1 entries, block_out_channels has 2"),
        ({"up_block_types": ["UpDecoderBlock2D", "CrossAttnUpBlock2D"]}, r"up_block_types\.1"),
        ({"sample_size": []}, "sample_size"),
        ({"use_quant_conv": False}, "unexpected: quant_conv"),
        ({"mid_block_add_attention": "yes"}, "mid_block_add_attention"),
    ],
)
def test_a_config_that_is_not_of_its_weights_is_refused(folder: Path, fields: dict[str, Any], reason: str) -> None:
    alter(folder, **fields)
    with pytest.raises(BundleError, match=reason):
        Codec(folder, LATENT, CPU)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["decoder.conv_in.bias"][0] = float("nan")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(BundleError, match=r"conv_in\.bias holds NaN"):
        Codec(folder, LATENT, CPU)


def test_what_the_library_finds_wrong_at_last_is_a_bundle_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the library may refuse a config."""
    monkeypatch.setattr(KLConfig, "arguments", {"act_fn": 3})
    with pytest.raises(BundleError, match="cannot be built: AttributeError"):
        Codec(folder, LATENT, CPU)

"""The autoencoder's training: what it learns, that it resumes, and what lies in its folder afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from patchforge.model.codec import Codec
from patchforge.model.errors import DataError
from patchforge.model.storage.bundle import read_autoencoder_config
from patchforge.model.training.autoencoder import (
    AutoencoderRecipe,
    AutoencoderTrainer,
    fold,
    split_kernels,
    train_autoencoder,
    unfold,
)
from patchforge.model.training.autoencoder_loss import reconstruction_loss, sharpness_loss
from patchforge.model.training.data import Pictures, folder_pictures
from patchforge.model.training.latents import latent_scale
from patchforge.model.training.preview import PreviewRecipe, train_preview
from tests.model.shapes import shapes

CPU = torch.device("cpu")
TINY = AutoencoderRecipe(
    width=16, latent_channels=4, encoder_blocks=(1, 1), decoder_blocks=(1, 0), batch=4, crop=16, steps=60, perceptual=0
)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return shapes()


def test_it_learns_and_a_codec_opens_it(pictures: Pictures, tmp_path: Path) -> None:
    untrained = train_autoencoder(pictures, tmp_path / "untrained", replace(TINY, steps=1))
    assert train_autoencoder(pictures, tmp_path / "trained", replace(TINY, steps=150)) > untrained + 5
    scale = latent_scale(tmp_path / "trained")
    codec = Codec(tmp_path / "trained", scale, CPU)
    images = torch.from_numpy(pictures.images[:8])
    latents = codec.encode(images)
    assert latents.shape == (8, 4, 8, 8)
    assert 0.5 < latents.std() < 2
    assert codec.decode(latents).shape == images.shape
    assert codec.preview(latents) is None
    assert read_autoencoder_config(tmp_path / "trained").downscale == 4


@pytest.mark.parametrize("by", [1, 2, 4])
def test_folding_gives_the_sides_that_the_config_says(by: int, pictures: Pictures, tmp_path: Path) -> None:
    recipe = replace(TINY, fold=by, steps=1)
    train_autoencoder(pictures, tmp_path, recipe)
    config = read_autoencoder_config(tmp_path)
    assert (config.fold, config.downscale) == (by, recipe.downscale) == (by, 2 * by)
    pixels = torch.rand(2, 3, 8, 8)
    assert fold(pixels, by).shape == (2, 3 * by**2, 8 // by, 8 // by)
    assert torch.equal(unfold(fold(pixels, by), by), pixels)


def test_a_size_that_no_model_can_use_is_refused_before_the_first_step(pictures: Pictures, tmp_path: Path) -> None:
    odd = pictures.resized(pictures.images.shape[1] + TINY.downscale)
    with pytest.raises(DataError, match=r"must be a multiple of \d+, such as \d+ or \d+"):
        train_autoencoder(odd, tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_and_an_uninterrupted_one_end_alike(pictures: Pictures, tmp_path: Path) -> None:
    recipe = replace(TINY, steps=6)
    stopped = AutoencoderTrainer(pictures, tmp_path / "a", recipe)
    stopped.begin()
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = AutoencoderTrainer(pictures, tmp_path / "a", recipe)
    resumed.run()
    whole = AutoencoderTrainer(pictures, tmp_path / "b", recipe)
    whole.run()
    assert resumed.step == whole.step == 6
    for name, value in resumed.network.state_dict().items():
        torch.testing.assert_close(whole.network.state_dict()[name], value, atol=1e-5, rtol=0)


def test_the_log_says_how_good_it_is_on_what_is_held_out(pictures: Pictures, tmp_path: Path) -> None:
    AutoencoderTrainer(pictures, tmp_path, replace(TINY, steps=2, save_every_seconds=0)).run()
    lines = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["psnr"] < 60 for line in lines)


def test_latents_begin_wider_than_the_noise_on_them(pictures: Pictures, tmp_path: Path) -> None:
    trainer = AutoencoderTrainer(pictures, tmp_path, TINY)
    trainer.begin()
    images = torch.from_numpy(pictures.images[:32]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        assert 0.5 < trainer.network.encode(fold(images, 2)).latents.std() < 2


def test_square_kernels_are_told_from_the_rest(pictures: Pictures, tmp_path: Path) -> None:
    network = AutoencoderTrainer(pictures, tmp_path, TINY).network
    kernels, rest = split_kernels(network)
    assert {tuple(each.shape) for each in kernels} == {(16, 16, 3, 3)}
    assert len(kernels) + len(rest) == len(list(network.parameters()))


def test_nothing_held_out_is_trained_on(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    trainer = AutoencoderTrainer(pictures, tmp_path, TINY)
    assert not pictures.held_out()[trainer.rows.numpy()].any()
    assert len(trainer.rows) == pictures.trained().sum()


def test_a_preview_decoder_shows_colours_at_half_the_latents_scale(pictures: Pictures, tmp_path: Path) -> None:
    train_autoencoder(pictures, tmp_path, replace(TINY, steps=150, sharpness=0))
    before = train_preview(pictures, tmp_path, PreviewRecipe(steps=1))
    assert train_preview(pictures, tmp_path, PreviewRecipe(steps=300)) > before + 3
    codec = Codec(tmp_path, latent_scale(tmp_path), CPU)
    images = torch.from_numpy(pictures.images[:6])
    shown = codec.preview(codec.encode(images))
    assert shown is not None
    assert shown.shape == (6, 32, 32, 3)  # f4 latents, four pixels each
    error = np.abs(shown.numpy().astype(int) - pictures.images[:6].astype(int)).mean()
    assert error < 25
    alone = [codec.preview(codec.encode(images[row : row + 1])) for row in range(6)]
    assert torch.equal(torch.cat([each for each in alone if each is not None]), shown)


def test_a_decoder_is_trained_further_and_the_latents_stay(pictures: Pictures, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    first = train_autoencoder(pictures, before, replace(TINY, steps=60))
    fewer = pictures.rows(np.arange(0, len(pictures), 2))  # of other statistics
    train_autoencoder(fewer, tmp_path / "fewer", replace(TINY, steps=2), decoder_of=before)
    second = train_autoencoder(pictures, after, replace(TINY, steps=250), decoder_of=before)
    assert second > first
    old, new = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (before, after))
    changed = {name for name, value in old.items() if not torch.equal(value, new[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    figures = [json.loads((folder / "latents.json").read_text()) for folder in (before, after, tmp_path / "fewer")]
    assert all((each["mean"], each["std"]) == (figures[0]["mean"], figures[0]["std"]) for each in figures)
    assert str(tmp_path) not in (after / "config.json").read_text(), "a folder of this machine"


def test_a_decoder_with_more_blocks_begins_with_the_weights_that_both_have(pictures: Pictures, tmp_path: Path) -> None:
    train_autoencoder(pictures, tmp_path / "before", replace(TINY, steps=60))
    recipe = replace(TINY, decoder_blocks=(2, 1))
    network = AutoencoderTrainer(pictures, tmp_path / "after", recipe, decoder_of=tmp_path / "before").network
    old = load_file(tmp_path / "before" / "diffusion_pytorch_model.safetensors")
    new = network.state_dict()
    assert tuple(network.config["num_decoder_blocks"]) == (2, 1)
    assert all(torch.equal(value.float(), new[name]) for name, value in old.items() if name.startswith("encoder."))
    carried = [value for name, value in old.items() if name.startswith("decoder.")]
    begun = [value for name, value in new.items() if name.startswith("decoder.")]
    assert len(begun) > len(carried)
    assert all(any(torch.equal(value.float(), other) for other in begun) for value in carried)
    train_autoencoder(pictures, tmp_path / "after", replace(recipe, steps=3), decoder_of=tmp_path / "before")
    assert read_autoencoder_config(tmp_path / "after").downscale == 4


def test_blur_costs_sharpness_and_a_shift_hardly_does() -> None:
    edges = torch.zeros(1, 3, 32, 32)
    edges[..., 9:25] = 1
    blurred = F.avg_pool2d(F.pad(edges, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    shifted = edges.roll(1, dims=-1)
    assert sharpness_loss(edges, edges) == 0
    assert sharpness_loss(blurred, edges) > 5 * sharpness_loss(shifted, edges)
    assert reconstruction_loss(shifted, edges) > reconstruction_loss(edges, edges) == 0


def test_a_decoder_of_another_fold_is_refused(pictures: Pictures, tmp_path: Path) -> None:
    train_autoencoder(pictures, tmp_path / "one", replace(TINY, steps=1))
    other = replace(TINY, fold=1 if TINY.fold > 1 else 2, steps=1)
    with pytest.raises(DataError, match="channels, not"):
        train_autoencoder(pictures, tmp_path / "two", other, decoder_of=tmp_path / "one")
    with pytest.raises(DataError, match="not a trained autoencoder"):
        train_autoencoder(pictures, tmp_path / "two", TINY, decoder_of=tmp_path / "nothing")
    with pytest.raises(DataError, match="2 levels, not 3"):
        train_autoencoder(
            pictures, tmp_path / "two", replace(TINY, decoder_blocks=(1, 1, 0)), decoder_of=tmp_path / "one"
        )

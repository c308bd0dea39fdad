"""Training at two sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchforge.model.networks.attention import Layout
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import open_bundle
from patchforge.model.storage.weights import load_weights
from patchforge.model.training.autoencoder import train_autoencoder
from patchforge.model.training.data import Pictures, folder_pictures
from patchforge.model.training.loop import Recipe, Small, Trainer, at_grid
from patchforge.model.training.run import Size, build
from patchforge.model.types import Grid
from tests.model.training.runs import TINY_AUTOENCODER, train


def two_sizes(pictures: Pictures, out: Path, steps: int, **changes: Any) -> Trainer:
    """Text-conditioned on latents of 8×8 and of 4×4 cells, whose captions are single random tokens."""
    torch.manual_seed(0)
    network = build("text", 4, 8, 2, Size(width=64, depth=1))
    colours = torch.from_numpy(pictures.images[:, 16, 16]).float() / 128 - 1
    cells = torch.cat([colours, colours[:, :1]], dim=1)[:, :, None, None]
    small = Small(16, batch=4, **changes)
    recipe = Recipe(steps=steps, batch=2, warm_up=2, save_every_seconds=1e9, small=small)
    latents, small_latents = (cells.expand(-1, -1, side, side) for side in (8, 4))
    weights = torch.from_numpy(pictures.weights)
    return Trainer(network, latents, weights, OneToken(len(pictures)), recipe, out, small_latents)


class OneToken:
    """Text conditions without an encoder."""

    def __init__(self, count: int) -> None:
        self.states = torch.randn(count, 1, 384, generator=torch.Generator().manual_seed(1))
        self.patches: list[int] = []

    def predict(
        self, network: Any, picked: np.ndarray, noisy: torch.Tensor, times: torch.Tensor, drop: float
    ) -> torch.Tensor:
        batch, patches = times.shape
        self.patches.append(patches)
        assert len(network.centres) == patches
        layout = Layout.dense(batch, patches, noisy.device, network.refine(self.states[picked]))
        out: torch.Tensor = network(noisy.flatten(0, 1), times.flatten(), None, layout)
        return out


def test_a_smaller_size_comes_first_and_then_its_share(folder: Path, tmp_path: Path) -> None:
    trainer = two_sizes(folder_pictures(folder, 32), tmp_path, 60, first_steps=5, share=0.3)
    for _ in range(60):
        trainer.train_step()
    seen = trainer.conditions.patches  # type: ignore[attr-defined]
    assert set(seen[:5]) == {4}
    assert 5 < seen[5:].count(4) < 30
    assert set(seen) == {4, 16}
    assert trainer.samples == 4 * seen.count(4) + 2 * seen.count(16)
    assert len(trainer.network.centres) == 16
    assert trainer.small is not None
    assert trainer.small.timesteps is trainer.full.timesteps is trainer.recipe.timesteps


def test_a_run_of_two_sizes_resumes_as_if_it_had_not_stopped(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    stopped = two_sizes(pictures, tmp_path / "a", 8, first_steps=2, share=0.5)
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = two_sizes(pictures, tmp_path / "a", 8, first_steps=2, share=0.5)
    resumed.run()
    whole = two_sizes(pictures, tmp_path / "b", 8, first_steps=2, share=0.5)
    whole.run()
    assert resumed.samples == whole.samples
    for name, value in whole.average.values.items():
        torch.testing.assert_close(resumed.average.values[name], value, atol=1e-5, rtol=0)


def test_positions_of_both_sizes_lie_on_one_canvas() -> None:
    network = build("text", 4, 8, 2, Size(width=64, depth=1))
    own, grid = network.centres, Grid(2, 2, 2, 4)
    with at_grid(network, grid):
        assert network.centres.tolist() == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
        for quarter in range(4):  # each is the middle of the four that it represents
            y, x = divmod(quarter, 2)
            inside = own.view(4, 4, 2)[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 2)
            torch.testing.assert_close(inside.mean(dim=0), network.centres[quarter])
    assert network.centres is own


def test_a_class_model_learns_at_two_sizes_and_is_a_bundle_of_one(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    small = Small(16, batch=4, first_steps=2, share=0.5)
    done = train(pictures, tmp_path, "kinds", steps=3, small=small)
    assert done.manifest.native_sizes == ((32, 32),)
    assert not (tmp_path / "kinds" / "kinds-16-bundle").exists()
    errors = json.loads((tmp_path / "kinds" / "held-out.jsonl").read_text().splitlines()[-1])
    assert {"trained", "trained_16"} <= set(errors)
    table = load_weights(done.weights)["pos_embed"]
    assert table.shape == (1, 16, 64)  # that of the large grid
    pipeline = Pipeline.open(done.folder)
    made, _ = pipeline.sample(pipeline.default_sampler(steps=2), [pipeline.condition_on(pictures.class_names[0])], [0])
    assert made.shape[1:3] == (32, 32)


def test_a_coarse_patch_of_a_class_network_is_in_the_middle_of_the_fine_ones() -> None:
    network = build("class", 4, 8, 2, Size(width=64, depth=1))
    own, grid = network.pos_embed, Grid(2, 2, 2, 4)
    angle = torch.tensor([0.5, 2.5], dtype=torch.float64)  # in units of fine patches: between 0 and 1, between 2 and 3
    with at_grid(network, grid):
        table = network.pos_embed[0]
        assert table.shape == (4, 64)
        torch.testing.assert_close(table[:2, 0], angle.sin().float())  # the columns' fastest wave
        torch.testing.assert_close(table[::2, 32], angle.sin().float())  # the rows'
    assert network.pos_embed is own


def test_a_text_model_of_two_sizes_is_two_bundles(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    done = train(pictures, tmp_path, "words", kind="text", steps=3, small=Small(16, batch=4, share=0.5))
    small = open_bundle(tmp_path / "words" / "words-16-bundle")
    assert [each.manifest.latent.height for each in (done, small)] == [8, 4]
    assert [each.manifest.native_sizes for each in (done, small)] == [((32, 32), (16, 16)), ((16, 16),)]
    samplers = [each.manifest.defaults.sampler.model_dump() for each in (done, small)]
    assert [sampler.get("small_until") for sampler in samplers] == [0.5, None], "where it draws half the size too"
    for bundle in (done, small):
        pipeline = Pipeline.open(bundle.folder)
        made, _ = pipeline.sample(pipeline.default_sampler(steps=2), [pipeline.condition_on("red")], [0])
        assert made.shape[1:3] == (4 * bundle.manifest.latent.height,) * 2
    for name, value in load_weights(done.weights).items():
        assert torch.equal(value, load_weights(small.weights)[name])

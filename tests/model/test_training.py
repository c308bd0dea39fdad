"""Training: timesteps, optimiser, resuming, and the whole way from a folder of pictures to a served bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from model.bundle import Bundle, open_bundle
from model.errors import DataError
from model.pipeline import Pipeline
from model.training.autoencoder import AutoencoderRecipe, train_autoencoder
from model.training.conditions import ClassConditions, TextConditions
from model.training.data import Pictures, folder_pictures
from model.training.latents import encode_pictures
from model.training.loop import Recipe, Trainer
from model.training.optimiser import MovingAverage, Muon, orthogonalise, split_parameters
from model.training.run import Kind, Size, build, train_model
from model.training.timesteps import SCHEDULES
from model.weights import load_weights
from service.cli import app
from tests.pretend_device import PRETENDED, PretendDevice


def small_trainer(pictures: Pictures, out: Path, steps: int, minutes: float | None = None) -> Trainer:
    torch.manual_seed(0)
    network = build("class", 4, 8, 2, Size(width=64, depth=2))
    colours = torch.from_numpy(pictures.images[:, 16, 16]).float() / 128 - 1
    latents = torch.cat([colours, colours[:, :1]], dim=1)[:, :, None, None].expand(-1, -1, 8, 8)
    recipe = Recipe(steps=steps, minutes=minutes, batch=16, warm_up=10, save_every_seconds=1e9)
    return Trainer(network, latents, torch.from_numpy(pictures.weights), ClassConditions(pictures), recipe, out)


def train(
    pictures: Pictures,
    out: Path,
    name: str,
    *,
    kind: Kind = "class",
    autoencoder: Path | None = None,
    start: Bundle | None = None,
    width: int = 64,
    **recipe: Any,
) -> Bundle:
    """A few steps of `train_model`; the autoencoder is that in ``out`` unless another is given."""
    of = autoencoder or out / "autoencoder"
    done = train_model(kind, pictures, of, out / name, Recipe(batch=16, **recipe), Size(width, 1), "none", start)
    return open_bundle(done)


def test_training_learns_and_resumes_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    small_trainer(pictures, tmp_path, 60).run()
    resumed = small_trainer(pictures, tmp_path, 150)
    started = []
    resumed.run(lambda trainer: started.append(trainer.step))
    assert started == [150]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [50, 100, 150]
    assert log[-1]["flow"] < 0.8 * log[0]["flow"]
    assert log[-1]["nll"] < log[0]["nll"]


def test_a_stopped_run_and_an_uninterrupted_one_give_the_same_weights(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    stopped = small_trainer(pictures, tmp_path / "a", 6)
    stopped.train_step()
    stopped.train_step()
    stopped.save()
    resumed = small_trainer(pictures, tmp_path / "a", 6)
    resumed.run()
    whole = small_trainer(pictures, tmp_path / "b", 6)
    whole.run()
    for name, value in whole.average.values.items():
        torch.testing.assert_close(resumed.average.values[name], value, atol=1e-5, rtol=0)


def test_the_command_line_from_pictures_to_a_bundle(folder: Path, tmp_path: Path) -> None:
    table, autoencoder, run = tmp_path / "table.npz", tmp_path / "autoencoder", tmp_path / "colours"

    def command(*words: str) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    assert "60 pictures, 2 classes" in command("data", "folder", str(folder), "--out", str(table), "--size", "32")
    command("train", "autoencoder", "--data", str(table), "--out", str(autoencoder), "--steps", "40", "--threads", "1")
    shared = ["--data", str(table), "--autoencoder", str(autoencoder), "--steps", "30", "--width", "64", "--depth", "1"]
    shared += ["--threads", "1"]
    command("train", "model", "class", "--out", str(run), *shared)
    assert (run / "samples-000030.png").exists()
    bundle = run / "colours-bundle"
    pipeline = Pipeline.open(bundle)
    assert pipeline.manifest.name == "colours"
    assert pipeline.manifest.class_names == ("blue", "red")
    assert pipeline.manifest.training["steps"] == 30
    judge = ["--judge", str(tmp_path / "judge"), "--data", str(table), "--threads", "1"]
    output = command("train", "judge", "--out", str(tmp_path / "judge"), "--steps", "5", *judge[2:])
    assert "held-out concepts" in output
    command("eval", str(bundle), *judge, "--pictures", "20", "--part", "quality", "--record")
    assert Pipeline.open(bundle).manifest.evaluation["measures"]["class_top1"]["chance"] == 0.5
    command("train", "model", "text", "--out", str(tmp_path / "words"), *shared)
    out = command("generate", "red", "--bundle", str(tmp_path / "words" / "words-bundle"), "--out", str(tmp_path))
    assert "saved" in out
    with Image.open(tmp_path / "00-red-0.png") as picture:
        assert picture.size == (32, 32)


def test_a_run_goes_on_from_a_bundle_in_its_latents(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", AutoencoderRecipe(width=16, steps=20))
    first = train(pictures, tmp_path, "first", steps=20)
    nowhere = tmp_path / "there-is-no-such-autoencoder"
    still = train(pictures, tmp_path, "second", steps=1, autoencoder=nowhere, start=first, muon_rate=0, adam_rate=0)
    assert still.manifest.training["earlier_samples"] == 20 * 16
    assert still.manifest.latent == first.manifest.latent
    before, after = (load_weights(each.weights) for each in (first, still))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-3, rtol=1e-3)  # the sizes are the bundle's, too
    # Resumed without naming the bundle again, it stays in the bundle's latents and still counts its samples.
    further = train(pictures, tmp_path, "second", steps=3, autoencoder=nowhere, width=64)
    assert further.manifest.training["steps"] == 3
    assert further.manifest.training["earlier_samples"] == 20 * 16
    assert not torch.equal(load_weights(further.weights)["x_embedder.proj.weight"], before["x_embedder.proj.weight"])


def test_a_bundle_of_another_kind_or_of_other_classes_is_no_beginning(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", AutoencoderRecipe(width=16, steps=2))
    first = train(pictures, tmp_path, "first", steps=1)
    others = replace(pictures, class_names=["green", "red"])
    for kind, shown in (("text", pictures), ("class", others)):
        with pytest.raises(DataError, match=f"not a {kind} model of these pictures"):
            train(shown, tmp_path, "second", kind=kind, steps=1, start=first)
    foreign = replace(first, manifest=first.manifest.model_copy(update={"training": {}}))
    with pytest.raises(DataError, match="latent statistics are not recorded"):
        train(pictures, tmp_path, "third", steps=1, start=foreign)


def test_minutes_end_a_run_and_its_learning_rate(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=1_000_000, minutes=10, warm_up=1, constant_share=0.5)
    assert [recipe.rate(1000, 60 * minutes) for minutes in (0, 5, 7.5, 10)] == pytest.approx([1, 1, 0.51, 0.02])
    assert Recipe(steps=100, minutes=10, warm_up=1).rate(100, 0) == pytest.approx(0.02)  # steps came first
    assert Recipe(steps=100, warm_up=1, constant_share=1).rate(99) == 1
    trainer = small_trainer(folder_pictures(folder, 32), tmp_path, 1_000_000, minutes=1e-6)
    trainer.run()
    assert trainer.step == 1


def test_runs_that_differ_in_timesteps_see_the_same_pictures_and_noise(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("ltg", "uniform"):
        trainer = small_trainer(pictures, tmp_path / name, 3)
        trainer.recipe = replace(trainer.recipe, timesteps=SCHEDULES[name])
        batches = seen.setdefault(name, [])
        predict = trainer.conditions.predict

        def spy(network: Any, picked: np.ndarray, noisy: torch.Tensor, times: torch.Tensor, drop: float) -> Any:
            clean = trainer.patches[picked]  # noqa: B023
            batches.append((noisy - times[..., None] * clean) / (1 - times[..., None]))  # noqa: B023
            return predict(network, picked, noisy, times, drop)  # noqa: B023

        trainer.conditions.predict = spy  # type: ignore[method-assign]
        for _ in range(3):
            trainer.train_step()
    for one, other in zip(seen["ltg"], seen["uniform"], strict=True):
        assert (one - other).abs().median() < 1e-4  # where hardly any noise is left it cannot be told back


def test_on_another_device_the_same_steps_are_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = folder_pictures(folder, 32)
    here = small_trainer(pictures, tmp_path / "here", 3)
    losses = [here.train_step().flow.item() for _ in range(3)]
    monkeypatch.setattr("model.training.loop.best_device", lambda: PRETENDED)
    with PretendDevice():
        there = small_trainer(pictures, tmp_path / "there", 3)
        # A CPU with fast bf16 trains in that.
        assert [there.train_step().flow.item() for _ in range(3)] == pytest.approx(losses, rel=0.02)
        assert {each.device for each in there.network.parameters()} == {PRETENDED}


def test_latents_are_encoded_once(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", AutoencoderRecipe(width=16, steps=2))
    cache = tmp_path / "cache"
    first = encode_pictures(pictures.images, tmp_path / "autoencoder", cache)
    (kept,) = cache.iterdir()
    made = kept.stat().st_mtime_ns
    assert torch.equal(encode_pictures(pictures.images, tmp_path / "autoencoder", cache), first)
    assert kept.stat().st_mtime_ns == made
    assert torch.equal(encode_pictures(pictures.images[:7], tmp_path / "autoencoder", cache), first[:7])


def test_muon_orthogonalises_and_lowers_a_loss() -> None:
    matrix = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    weight = torch.nn.Parameter(torch.zeros(12, 12))
    target, muon = torch.eye(12), Muon([weight], lr=0.02)
    for _ in range(60):
        loss = (weight - target).square().sum()
        loss.backward()
        muon.step()
        muon.zero_grad()
    assert loss < 1.0


def test_matrices_of_the_blocks_go_to_muon_and_nothing_is_left_out() -> None:
    for kind in ("class", "text"):
        network = build(kind, 4, 8, 2, Size(width=64, depth=2))
        matrices, rest = split_parameters(network)
        assert len(matrices) + len(rest) == len(list(network.parameters()))
        assert {parameter.ndim for parameter in matrices} == {2}


def test_the_moving_average_forgets_its_start() -> None:
    layer = torch.nn.Linear(2, 2)
    average = MovingAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(3.0)
    for step in range(80):
        average.update(layer, step)
    assert average.values["weight"] == pytest.approx(torch.full((2, 2), 3.0), abs=1e-2)


def test_a_text_run_that_was_stopped_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)

    def trainer(out: str) -> Trainer:
        torch.manual_seed(0)
        network = build("text", 4, 8, 2, Size(width=64, depth=1))
        conditions = TextConditions(pictures, 8, tmp_path / "cache")
        latents = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        recipe = Recipe(steps=6, batch=8)
        return Trainer(network, latents, torch.from_numpy(pictures.weights), conditions, recipe, tmp_path / out)

    stopped = trainer("a")
    stopped.train_step()
    stopped.save()
    torch.rand(100)
    resumed, whole = trainer("a"), trainer("b")
    resumed.run()
    torch.manual_seed(0)
    whole = trainer("b")
    whole.run(lambda trainer: torch.rand(3))  # what a sample grid draws must not matter
    for name, value in whole.average.values.items():
        torch.testing.assert_close(resumed.average.values[name], value, atol=1e-5, rtol=0)


def test_what_cannot_become_a_bundle_is_not_trained(folder: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        return result.output

    table, autoencoder = tmp_path / "table.npz", tmp_path / "autoencoder"
    folder_pictures(folder, 32).save(table)
    shared = ["--data", str(table), "--autoencoder", str(autoencoder), "--steps", "2", "--width", "64", "--depth", "1"]
    assert "not a trained autoencoder" in refused("train", "model", "class", "--out", str(tmp_path / "a"), *shared)
    result = CliRunner().invoke(
        app, ["train", "autoencoder", "--data", str(table), "--out", str(autoencoder), "--steps", "2", "--threads", "1"]
    )
    assert result.exit_code == 0
    assert "name" in refused("train", "model", "class", "--out", str(tmp_path / "My Run!"), *shared)
    assert not (tmp_path / "My Run!" / "state.pt").exists()

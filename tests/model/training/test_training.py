"""Training: resuming, continuing, and everything from a folder of pictures to a served bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from patchforge.model.errors import DataError
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import open_bundle
from patchforge.model.storage.weights import load_weights
from patchforge.model.training.autoencoder import train_autoencoder
from patchforge.model.training.conditions import ClassConditions, TextConditions
from patchforge.model.training.data import folder_pictures
from patchforge.model.training.latents import encode_pictures
from patchforge.model.training.loop import Recipe, Small, Trainer
from patchforge.model.training.run import Size, build, copy_trunk
from patchforge.model.training.snapshot import falling
from patchforge.model.training.timesteps import SCHEDULES
from patchforge.model.training.validation import Validation
from patchforge.service.cli.main import app
from tests.model.training.runs import TINY_AUTOENCODER, small_trainer, train
from tests.pretend_device import PRETENDED, PretendDevice


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
    command("train", "autoencoder", "--data", str(table), "--out", str(autoencoder), "--steps", "8", "--threads", "1")
    shared = ["--data", str(table), "--autoencoder", str(autoencoder), "--steps", "30", "--width", "64", "--depth", "1"]
    shared += ["--threads", "1"]
    command("train", "model", "class", "--out", str(run), *shared)
    assert (run / "samples-000030-32.png").exists()
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
    out = command("train", "model", "text", "--out", str(tmp_path / "words"), *shared)
    assert "note: 60 pictures are few to learn everything from. --from emoji-text begins" in out
    words = tmp_path / "words" / "words-bundle"
    assert 0 < len(set(open_bundle(words).manifest.examples)) <= 8
    out = command("generate", "red", "--bundle", str(words), "--out", str(tmp_path), "--seed", "0")
    assert "saved" in out
    with Image.open(tmp_path / "red-0.png") as picture:
        assert picture.size == (32, 32)


def test_a_run_goes_on_from_a_bundle_in_its_latents(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", TINY_AUTOENCODER)
    first = train(pictures, tmp_path, "first", steps=20)
    nowhere = tmp_path / "there-is-no-such-autoencoder"
    still = train(pictures, tmp_path, "second", steps=1, autoencoder=nowhere, start=first, muon_rate=0, adam_rate=0)
    assert still.manifest.training["earlier_samples"] == 20 * 16
    assert still.manifest.latent == first.manifest.latent
    before, after = (load_weights(each.weights) for each in (first, still))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-3, rtol=1e-3)  # the bundle also gives the sizes
    # Resumed without the bundle's name, it keeps the bundle's latents and still counts its samples.
    further = train(pictures, tmp_path, "second", steps=3, autoencoder=nowhere, width=64)
    assert further.manifest.training["steps"] == 3
    assert further.manifest.training["earlier_samples"] == 20 * 16
    assert not torch.equal(load_weights(further.weights)["x_embedder.proj.weight"], before["x_embedder.proj.weight"])


def test_a_bundle_of_another_kind_or_of_other_classes_is_no_beginning(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    first = train(pictures, tmp_path, "first", steps=1)
    others = replace(pictures, class_names=["green", "red"])
    for kind, shown in (("text", pictures), ("class", others)):
        with pytest.raises(DataError, match=f"not a {kind} model for these pictures"):
            train(shown, tmp_path, "second", kind=kind, steps=1, start=first)
    foreign = replace(first, manifest=first.manifest.model_copy(update={"training": {}}))
    with pytest.raises(DataError, match="does not record its autoencoder"):
        train(pictures, tmp_path, "third", steps=1, start=foreign)


def test_a_trunk_is_taken_from_a_network_of_other_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, network = (build("text", channels, 8, 2, Size(width=64, depth=1)) for channels in (4, 6))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    ends = {name: value.clone() for name, value in network.state_dict().items() if "proj.weight" in name}
    copied = copy_trunk(network, tmp_path)
    after = network.state_dict()
    different = [name for name, value in source.state_dict().items() if value.shape != after[name].shape]
    assert different == ["merge.proj.weight", "split.proj.weight"]
    assert copied == len(after) - len(different)
    for name, value in source.state_dict().items():
        assert torch.equal(after[name], ends[name] if name in different else value)
    with pytest.raises(DataError, match="another network"):
        copy_trunk(build("text", 4, 8, 2, Size(96, 2, refiner_width=64)), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="holds no weights"):
        copy_trunk(network, tmp_path)


def test_rates_fall_in_a_copy_and_the_run_goes_on_untouched(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    run = small_trainer(pictures, tmp_path / "run", 1_000_000)
    run.recipe = replace(run.recipe, constant_share=1.0)
    for _ in range(3):
        run.train_step()
    run.seconds = 600.0
    run.save()
    before = (tmp_path / "run" / "state.pt").read_bytes()
    recipe = falling(tmp_path / "run", tmp_path / "end", run.recipe, minutes=5)
    assert [recipe.rate(1000, 60 * minutes) for minutes in (10, 12.5, 15)] == pytest.approx([1, 0.51, 0.02])
    end = small_trainer(pictures, tmp_path / "end", 1_000_000)
    end.recipe = replace(recipe, minutes=10 + 1e-6)
    end.run()
    assert end.step == 4
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    # A second call neither starts again nor changes the end.
    run.seconds = 900.0
    run.save()
    assert falling(tmp_path / "run", tmp_path / "end", run.recipe, minutes=5) == recipe
    with pytest.raises(DataError, match="no state"):
        falling(tmp_path / "nothing", tmp_path / "other", run.recipe, minutes=5)


def test_only_minutes_end_a_copy_and_no_other_run_is_overwritten(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    run = small_trainer(pictures, tmp_path / "run", 2)
    run.train_step()
    run.step = 50  # far more than the recipe's steps
    run.seconds = 600.0
    run.save()
    (tmp_path / "run" / "autoencoder").mkdir()
    (tmp_path / "run" / "autoencoder" / "latents.json").write_text("{}")
    recipe = falling(tmp_path / "run", tmp_path / "end", run.recipe, minutes=5)
    assert recipe.rate(50, 600) == pytest.approx(1)
    assert recipe.progress(50, 600) < 1
    assert recipe.progress(50, 900) == pytest.approx(1)
    assert (tmp_path / "end" / "autoencoder" / "latents.json").read_text() == "{}"
    small_trainer(pictures, tmp_path / "mine", 2).save()
    kept = (tmp_path / "mine" / "state.pt").read_bytes()
    for taken in ("mine", "run"):
        with pytest.raises(DataError, match="holds another run"):
            falling(tmp_path / "run", tmp_path / taken, run.recipe, minutes=5)
    assert (tmp_path / "mine" / "state.pt").read_bytes() == kept


def test_pictures_get_the_size_of_the_bundle_that_a_run_starts_with(folder: Path, tmp_path: Path) -> None:
    train_autoencoder(folder_pictures(folder, 32), tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    first = train(folder_pictures(folder, 32), tmp_path, "first", steps=1)
    larger = train(folder_pictures(folder, 64), tmp_path, "second", steps=1, start=first)
    assert larger.manifest.size == (32, 32)
    with pytest.raises(DataError, match="16 pixels, but first draws 32"):
        train(folder_pictures(folder, 16), tmp_path, "third", steps=1, start=first)


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
        trainer.full = replace(trainer.full, timesteps=SCHEDULES[name])
        batches = seen.setdefault(name, [])
        predict = trainer.conditions.predict

        def spy(network: Any, picked: np.ndarray, noisy: torch.Tensor, times: torch.Tensor, drop: float) -> Any:
            clean = trainer.full.patches[picked]  # noqa: B023
            batches.append((noisy - times[..., None] * clean) / (1 - times[..., None]))  # noqa: B023
            return predict(network, picked, noisy, times, drop)  # noqa: B023

        trainer.conditions.predict = spy  # type: ignore[method-assign]
        for _ in range(3):
            trainer.train_step()
    for one, other in zip(seen["ltg"], seen["uniform"], strict=True):
        assert (one - other).abs().median() < 1e-4  # near t = 1 the noise cannot be recovered exactly


def test_on_another_device_the_same_steps_are_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = folder_pictures(folder, 32)
    here = small_trainer(pictures, tmp_path / "here", 3)
    losses = [here.train_step().flow.item() for _ in range(3)]
    monkeypatch.setattr("patchforge.model.training.loop.best_device", lambda: PRETENDED)
    with PretendDevice():
        there = small_trainer(pictures, tmp_path / "there", 3)
        # A CPU with fast bf16 trains in bf16.
        assert [there.train_step().flow.item() for _ in range(3)] == pytest.approx(losses, rel=0.02)
        assert {each.device for each in there.network.parameters()} == {PRETENDED}


def test_latents_are_encoded_once(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    cache = tmp_path / "cache"
    first = encode_pictures(pictures.images, tmp_path / "autoencoder", cache)
    (kept,) = cache.iterdir()
    made = kept.stat().st_mtime_ns
    assert torch.equal(encode_pictures(pictures.images, tmp_path / "autoencoder", cache), first)
    assert kept.stat().st_mtime_ns == made
    assert torch.equal(encode_pictures(pictures.images[:7], tmp_path / "autoencoder", cache), first[:7])


def test_a_text_run_that_was_stopped_goes_on_as_if_it_had_not(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)

    def trainer(out: str) -> Trainer:
        torch.manual_seed(0)
        network = build("text", 4, 8, 2, Size(width=64, depth=1))
        conditions = TextConditions(pictures, 8, tmp_path / "cache")
        latents = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        recipe = Recipe(steps=6, batch=8, sample_every=2)
        return Trainer(network, latents, torch.from_numpy(pictures.weights), conditions, recipe, tmp_path / out)

    stopped = trainer("a")
    stopped.train_step()
    stopped.save()
    torch.rand(100)
    resumed, whole = trainer("a"), trainer("b")
    resumed.run()
    torch.manual_seed(0)
    whole = trainer("b")
    whole.run(lambda trainer: torch.rand(3))  # random numbers of a sample grid must not matter
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
    odd = refused("train", "model", "text", "--out", str(tmp_path / "a"), *shared, "--small", "20")
    assert "--small is 20 pixels, and must be a multiple of 16, such as 16 or 32" in odd
    assert not (tmp_path / "My Run!" / "state.pt").exists()


def test_held_out_errors_are_logged_by_part_and_size(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    train(pictures, tmp_path, "words", kind="text", steps=4, sample_every=2, small=Small(16, batch=4, share=0.5))
    lines = [json.loads(line) for line in (tmp_path / "words" / "held-out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    parts = {"trained", "trained_16", "concepts", "concepts_16"}
    assert set(lines[0]) == {"step", "samples", "seconds"} | parts | {f"{part}_start" for part in parts}
    assert all(0 < line[name] < 5 for line in lines for name in ("trained", "concepts", "concepts_16"))


def test_measuring_moves_neither_weights_nor_random_numbers(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    trainer = small_trainer(pictures, tmp_path / "run", 9)
    trainer.train_step()
    validation = Validation(pictures, None, tmp_path / "autoencoder", tmp_path / "cache", ClassConditions)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    state = torch.get_rng_state()
    first = validation.write(trainer)
    assert validation.write(trainer) == first
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(value, before[name])
    trainer.average.values = {name: torch.zeros_like(value) for name, value in trainer.average.values.items()}
    assert validation.write(trainer) != first  # it measures the average


class MinusNoise:
    """Conditions of a network that believes that all pictures are 0 everywhere, and so sees nothing but noise."""

    def predict(self, network: Any, picked: np.ndarray, noisy: torch.Tensor, times: torch.Tensor, drop: float) -> Any:
        cells = -noisy.unflatten(-1, (4, -1))
        return torch.cat([cells, torch.zeros_like(cells[..., :1])], dim=-1).flatten(2).flatten(0, 1)


def test_the_error_at_the_start_is_a_share_of_the_variance_of_trained_pictures(folder: Path, tmp_path: Path) -> None:
    pictures = folder_pictures(folder, 32)
    train_autoencoder(pictures, tmp_path / "autoencoder", replace(TINY_AUTOENCODER, steps=2))
    trainer = small_trainer(pictures, tmp_path / "run", 9)
    latents = encode_pictures(pictures.where(pictures.trained()).images, tmp_path / "autoencoder")
    trainer.full = replace(trainer.full, patches=trainer.network.grid.patchify(latents))
    measured = Validation(pictures, None, tmp_path / "autoencoder", tmp_path / "cache", lambda _: MinusNoise())
    found = measured.write(trainer)["trained_start"]
    variance = (latents - latents.mean(dim=0)).square().mean()
    assert found == pytest.approx((latents.square().mean() / variance).item(), rel=1e-3)

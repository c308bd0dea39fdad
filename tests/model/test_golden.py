"""Networks, samplers, guidance and loss against the reference's vectors (spec §§3-6)."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model.errors import BundleError
from model.training.timesteps import LTG
from model.verify import parse_sample_key, verify
from service.cli import app

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("pft_class", "pft_t2i")


@pytest.mark.parametrize("name", FILES)
def test_every_key_matches_alone_and_packed_with_all_others(name: str) -> None:
    differences = list(verify(GOLDEN / f"{name}.safetensors"))
    samples = [each for each in differences if each.key.startswith("sample.")]
    assert len(samples) == 8
    assert all(each.packed is not None for each in differences if each.key.startswith(("sample.", "out.")))
    assert {each.key: each.worst for each in differences if not each.worst <= 1e-4} == {}


def test_the_loss_matches() -> None:
    found = {each.key: each.worst for each in verify(GOLDEN / "pft_class.safetensors") if each.key.startswith("train.")}
    assert found["train.flow_loss"] <= 1e-5
    assert found["train.uncertainty_nll"] <= 1e-5


def test_the_command_prints_each_key_and_fails_above_the_tolerance(tmp_path: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(GOLDEN / "pft_t2i.safetensors")])
    assert good.exit_code == 0
    assert "look_ahead" in good.output
    strict = CliRunner().invoke(app, ["verify", str(GOLDEN / "pft_t2i.safetensors"), "--tolerance", "1e-9"])
    assert strict.exit_code == 1


@pytest.mark.parametrize("value", [0.01, math.nan])
def test_a_changed_weight_is_noticed(tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.blocks.1.mlp.fc2.bias"] += value

    path = changed(tmp_path, change)
    assert all(each.worst > 1e-4 for each in verify(path) if each.key.startswith(("sample.", "out.")))
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 1


@pytest.mark.parametrize("key", ["in.t", "in.y", "out.logvar", "model.pos_embed"])
def test_a_file_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(BundleError, match="not a golden file"):
        list(verify(changed(tmp_path, lambda tensors: tensors.pop(key))))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The class golden with its tensors changed."""
    source, path = GOLDEN / "pft_class.safetensors", folder / "changed.safetensors"
    tensors = load_file(source)
    change(tensors)
    with safe_open(source, "pt") as file:
        save_file(tensors, path, file.metadata())
    return path


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError):
        list(verify(path))


def test_sample_keys_are_read_with_their_parameters() -> None:
    assert parse_sample_key("sample.dual_loop.p0.7.inner3.steps5.cfg1.5") == (
        "dual_loop",
        {"quantile": 0.7, "inner_steps": 3, "steps": 5, "guidance": 1.5},
    )
    with pytest.raises(BundleError, match="warp9"):
        parse_sample_key("sample.euler.warp9.steps6.cfg1")
    with pytest.raises(BundleError):
        parse_sample_key("sample.x")


def test_ltg_timesteps_follow_the_golden_draws() -> None:
    golden = load_file(GOLDEN / "pft_class.safetensors")["ltg.std0.6.loc0.7.scale1.t"]
    ours = LTG(loc=0.7).sample(*golden.shape, generator=torch.Generator().manual_seed(0))
    assert ours.min() >= 0
    assert ours.max() < 1
    # Kolmogorov–Smirnov distances: of all times (65,536 dependent draws) and of each sample's largest (4,096).
    assert ks_distance(golden.flatten(), ours.flatten()) < 0.02
    assert ks_distance(golden.amax(1), ours.amax(1)) < 0.04
    assert ks_distance(golden.std(1), ours.std(1)) < 0.04


def test_a_uniform_sampler_would_fail_that_test() -> None:
    golden = load_file(GOLDEN / "pft_class.safetensors")["ltg.std0.6.loc0.7.scale1.t"]
    uniform = torch.rand(golden.shape, generator=torch.Generator().manual_seed(0))
    assert ks_distance(golden.flatten(), uniform.flatten()) > 0.1


def ks_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    grid = torch.linspace(0, 1, 501)
    cdfs = [torch.searchsorted(each.sort().values, grid).double() / each.numel() for each in (a, b)]
    return float((cdfs[0] - cdfs[1]).abs().max())

"""Networks, samplers, guidance and loss match the golden vectors of a reference implementation (spec §§3–6)."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from patchforge.model.errors import BundleError
from patchforge.model.networks import pft
from patchforge.model.training.timesteps import LTG
from patchforge.model.verify import TOLERANCE, measure_difference, parse_sample_key, verify
from patchforge.service.cli.main import app

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("pft_class", "pft_t2i")


@pytest.mark.parametrize("name", FILES)
def test_every_key_matches_alone_and_packed_with_all_others(name: str) -> None:
    differences = list(verify(GOLDEN / f"{name}.safetensors"))
    samples = [each for each in differences if each.key.startswith("sample.")]
    assert len(samples) == 8
    assert all(each.packed is not None for each in differences if each.key.startswith(("sample.", "out.")))
    assert {each.key: each.worst for each in differences if not each.worst <= TOLERANCE} == {}


def test_the_loss_matches() -> None:
    found = {each.key: each.worst for each in verify(GOLDEN / "pft_class.safetensors") if each.key.startswith("train.")}
    assert found["train.flow_loss"] <= 6e-7
    assert found["train.uncertainty_nll"] <= 1e-5


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--tolerance", "1e-9"], 1)])
def test_the_command_prints_each_key_and_fails_above_the_tolerance(options: list[str], status: int) -> None:
    result = CliRunner().invoke(app, ["verify", str(GOLDEN / "pft_t2i.safetensors"), *options])
    assert result.exit_code == status
    assert "look_ahead" in result.output


@pytest.mark.parametrize(
    ("function", "mistaken"),
    [
        ("tanh_gelu", F.gelu),  # the exact GELU, not its tanh approximation
        ("modulated_norm", lambda x, shift, scale: shift + F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale)),
    ],
)
def test_a_subtle_mistake_in_the_network_is_found(
    monkeypatch: pytest.MonkeyPatch, function: str, mistaken: Callable[..., torch.Tensor]
) -> None:
    monkeypatch.setattr(pft, function, mistaken)
    assert max(each.worst for each in verify(GOLDEN / "pft_class.safetensors")) > TOLERANCE


def test_a_difference_is_relative_to_the_largest_golden_value() -> None:
    expected = torch.tensor([20.0, -0.5])
    assert measure_difference(expected + 1e-4, expected) == pytest.approx(5e-6, rel=0.02)
    assert measure_difference(expected / 100 + 1e-4, expected / 100) == pytest.approx(5e-4, rel=0.02)
    assert measure_difference(torch.ones(2), torch.zeros(2)) == 1
    assert math.isnan(measure_difference(torch.tensor([1.0, math.nan]), torch.ones(2)))


@pytest.mark.parametrize("value", [0.01, math.nan])
def test_a_changed_weight_is_found(tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.blocks.1.mlp.fc2.bias"] += value

    path = changed(tmp_path, change)
    assert all(each.worst > TOLERANCE for each in verify(path) if each.key.startswith(("sample.", "out.")))
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 1


@pytest.mark.parametrize("key", ["in.t", "in.y", "out.logvar", "model.pos_embed"])
def test_a_file_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(BundleError, match="not a golden file"):
        list(verify(changed(tmp_path, lambda tensors: tensors.pop(key))))


def test_sizes_out_of_range_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"in.x": torch.zeros(1)}, tmp_path / "huge.safetensors", {"config": '{"depth": 1000000}'})
    with pytest.raises(BundleError, match=r"not a golden file: (in_channels|depth): .*more\)"):
        list(verify(tmp_path / "huge.safetensors"))


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

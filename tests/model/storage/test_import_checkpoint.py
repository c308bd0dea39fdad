"""A checkpoint in the released format becomes a bundle. A checkpoint without a valid network is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from patchforge.model.errors import BundleError
from patchforge.model.networks.attention import Layout
from patchforge.model.networks.build import build_network
from patchforge.model.storage.bundle import load_weights, network_shapes, open_bundle
from patchforge.model.storage.import_checkpoint import LICENCE, import_checkpoint
from tests.model.model_files import SIZES, Bring, Calls, config_tree, save, tiny_weights
from tests.processes import PYTHON, run


def assert_holds(folder: Path, weights: dict[str, Tensor]) -> None:
    bundle = open_bundle(folder)
    loaded = load_weights(bundle.weights, network_shapes(bundle.manifest.network))
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.float()), name


# --- what is read ---


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_a_checkpoint_becomes_a_bundle(
    tmp_path: Path, autoencoder: Path, bring: Bring, wrap: Callable[[Any], Any]
) -> None:
    weights = tiny_weights()
    told = bring(save(tmp_path, wrap(config_tree()), weights))
    assert_holds(tmp_path / "out", weights)

    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.network.config.model_dump() == SIZES
    assert manifest.name == "out"
    assert manifest.licence == LICENCE
    assert manifest.class_names == ("0", "1", "2")
    assert manifest.latent.std == (pytest.approx(1 / 0.18215),) * 4
    assert manifest.latent.mean == (0.0,) * 4
    assert manifest.autoencoder.downscale == 2
    assert manifest.training["target"] == "somewhere.PFT"
    assert not [line for line in told if "num_heads" in line or "weights say" in line]
    copied = tmp_path / "out" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    assert copied.read_bytes() == (autoencoder / copied.name).read_bytes()


def test_the_imported_network_runs(tmp_path: Path, ckpt: Path, bring: Bring) -> None:
    bring(ckpt)
    bundle = open_bundle(tmp_path / "out")
    network = build_network(bundle.manifest.network.config).eval()
    network.load_state_dict(load_weights(bundle.weights))
    patches = torch.randn(16, 16)
    with torch.inference_mode():
        out = network(patches, torch.tensor([0.5]), torch.tensor([1]), None, Layout.dense(1, 16, torch.device("cpu")))
    assert out.shape == (16, 4 * 5)
    assert out.isfinite().all()


def test_the_importer_needs_neither_omegaconf_nor_diffusers() -> None:
    module = "patchforge.model.storage.import_checkpoint"
    code = f"import sys, {module}; print([name for name in ('omegaconf', 'diffusers') if name in sys.modules])"
    assert run(*PYTHON, code).stdout == "[]\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read(tmp_path: Path, bring: Bring, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in tiny_weights().items()}
    bring(save(tmp_path, config_tree(), weights))
    assert_holds(tmp_path / "out", weights)


def test_parameters_views_and_shared_storages_are_read(tmp_path: Path, bring: Bring) -> None:
    weights = tiny_weights()
    flat = torch.cat([weights["blocks.0.attn.proj.bias"], weights["blocks.1.attn.proj.bias"]])
    stored: dict[str, Tensor] = dict(weights)
    stored["blocks.0.attn.proj.bias"], stored["blocks.1.attn.proj.bias"] = flat.chunk(2)
    stored["blocks.0.attn.proj.weight"] = weights["blocks.0.attn.proj.weight"].t().contiguous().t()
    stored["pos_embed"] = torch.nn.Parameter(weights["pos_embed"])
    bring(save(tmp_path, config_tree(), stored))
    assert_holds(tmp_path / "out", weights)


@pytest.mark.parametrize("prefix", ["ema.", "model.", "net.", "module.model."])
def test_a_prefix_common_to_all_names_is_dropped(tmp_path: Path, bring: Bring, prefix: str) -> None:
    weights = tiny_weights()
    told = bring(save(tmp_path, config_tree(), {prefix + name: tensor for name, tensor in weights.items()}))
    assert_holds(tmp_path / "out", weights)
    assert any(prefix in line for line in told)


def test_of_two_networks_the_averaged_one_is_taken(tmp_path: Path, bring: Bring) -> None:
    weights = tiny_weights()
    both = {f"model.{name}": tensor + 1 for name, tensor in weights.items()}
    both |= {f"ema.{name}": tensor for name, tensor in weights.items()}
    told = bring(save(tmp_path, config_tree(), both))
    assert_holds(tmp_path / "out", weights)
    assert any("ignoring" in line for line in told)


def test_where_config_and_weights_disagree_the_weights_win_and_it_is_told(tmp_path: Path, bring: Bring) -> None:
    config = OmegaConf.create(config_tree(depth=12, num_classes="${depth}"))
    told = bring(save(tmp_path, config, tiny_weights()))
    assert open_bundle(tmp_path / "out").manifest.network.config.model_dump() == SIZES
    assert "the config says depth = 12, the weights say 2: using 2" in told
    assert any("${depth}" in line for line in told)


@pytest.mark.parametrize("config", [None, {}, {"target": 3, "params": [1]}, "text"])
def test_without_a_config_only_the_heads_must_be_given(tmp_path: Path, bring: Bring, config: Any) -> None:
    path = save(tmp_path, config, tiny_weights())
    with pytest.raises(BundleError, match="num_heads"):
        bring(path)
    bring(path, num_heads=2)
    assert open_bundle(tmp_path / "out").manifest.network.config.model_dump() == SIZES


def test_the_heads_of_a_released_width_are_known(tmp_path: Path, bring: Bring) -> None:
    told = bring(save(tmp_path, {}, tiny_weights(hidden_size=768, num_heads=12, depth=1)))
    assert open_bundle(tmp_path / "out").manifest.network.config.model_dump()["num_heads"] == 12
    assert any("num_heads: using 12" in line for line in told)


def test_class_names_come_from_a_file(tmp_path: Path, ckpt: Path, bring: Bring) -> None:
    (tmp_path / "names.txt").write_text("tench\ngoldfish, Carassius auratus\nHuhn\n", encoding="utf-8")
    bring(ckpt, class_names=tmp_path / "names.txt", name="mine", licence="mine too")
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.class_names == ("tench", "goldfish, Carassius auratus", "Huhn")
    assert (manifest.name, manifest.licence) == ("mine", "mine too")


def test_the_classes_of_imagenet_have_their_names(tmp_path: Path, bring: Bring) -> None:
    bring(save(tmp_path, config_tree(num_classes=1000), tiny_weights(num_classes=1000)), class_names=Path("imagenet"))
    assert open_bundle(tmp_path / "out").manifest.class_names[207] == "golden retriever"


def test_names_for_another_number_of_classes_are_refused(tmp_path: Path, ckpt: Path, bring: Bring) -> None:
    with pytest.raises(BundleError, match=r"1000 class names .*the network has 3 classes"):
        bring(ckpt, class_names=Path("imagenet"))


@pytest.mark.parametrize("text", [b"a\nb\n", b"a\nb\n\nc", b"a\na\nb", b"\xff\xfe\n"])
def test_class_names_that_do_not_fit_are_refused(tmp_path: Path, ckpt: Path, bring: Bring, text: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(text)
    with pytest.raises(BundleError, match="class"):
        bring(ckpt, class_names=tmp_path / "names.txt")
    assert not (tmp_path / "out").exists()


# --- weights that do not form a network ---


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pos_embed": torch.full((1, 16, 16), float("nan"))}, "pos_embed holds NaN"),
        ({"pos_embed": torch.zeros(1, 15, 16)}, "pos_embed is 1×15×16"),
        ({"pos_embed": torch.zeros(16)}, "pos_embed with 3 dimensions"),
        ({"final_layer.linear.weight": torch.zeros(16, 16)}, "final_layer.linear.weight is 16×16, not 20×16"),
        ({"blocks.0.attn.qkv.bias": None}, "missing: blocks.0.attn.qkv.bias"),
        ({"blocks.9999.attn.qkv.bias": torch.zeros(48)}, "depth"),
        ({"teacher.weight": torch.zeros(1)}, "unexpected: teacher.weight"),
        ({"x_embedder.proj.weight": None}, "no weight is named x_embedder.proj.weight or merge.proj.weight"),
        ({"x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)}, "impossible network"),
        ({"t_embedder.mlp.0.bias": torch.zeros(16, dtype=torch.int64)}, "torch.int64"),
        ({"t_embedder.mlp.0.bias": 3}, "is not a tensor"),
        ({3: torch.zeros(1)}, "is not a tensor"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_weights_that_make_no_network_are_refused(
    tmp_path: Path, bring: Bring, change: dict[Any, Any], reason: str
) -> None:
    weights = {name: value for name, value in ({**tiny_weights()} | change).items() if value is not None}
    with pytest.raises(BundleError) as caught:
        bring(save(tmp_path, config_tree(), weights))
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tree", [None, [], {"state_dict": None}, {"config": {}}, {"state_dict": {}}])
def test_other_trees_are_refused(tmp_path: Path, bring: Bring, tree: Any) -> None:
    torch.save(tree, tmp_path / "tiny.ckpt")
    with pytest.raises(BundleError, match=r"tiny\.ckpt"):
        bring(tmp_path / "tiny.ckpt")


# --- the autoencoder ---


def test_an_autoencoder_of_pickles_is_refused(tmp_path: Path, ckpt: Path, autoencoder: Path) -> None:
    folder = tmp_path / "old-vae"
    folder.mkdir()
    (folder / "config.json").write_bytes((autoencoder / "config.json").read_bytes())
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path}/marker")))
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model\.bin is a pickle.*safetensors"):
        import_checkpoint(ckpt, folder, tmp_path / "out")
    assert not (tmp_path / "marker").exists()


def test_an_autoencoder_of_other_latents_is_refused(tmp_path: Path, ckpt: Path, autoencoder: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    config = json.loads((autoencoder / "config.json").read_text()) | {"latent_channels": 16}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BundleError, match="16 latent channels"):
        import_checkpoint(ckpt, folder, tmp_path / "out")


def test_the_autoencoders_scale_and_shift_become_std_and_mean(tmp_path: Path, ckpt: Path, autoencoder: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    config = json.loads((autoencoder / "config.json").read_text()) | {"scaling_factor": 0.5, "shift_factor": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    latent = import_checkpoint(ckpt, folder, tmp_path / "out").latent
    assert (latent.mean, latent.std) == ((0.25,) * 4, (2.0,) * 4)

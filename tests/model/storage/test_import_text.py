"""Text-to-image checkpoints and those of training runs become bundles that draw; what is missing is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from patchforge.model.errors import BundleError
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import load_weights, open_bundle, write_bundle
from patchforge.model.storage.import_checkpoint import TEXT_LICENCE, import_checkpoint
from patchforge.model.storage.manifest import BundleManifest, FolderEncoder
from tests.model.model_files import SIZES, Bring, config_tree, save, tiny_weights
from tests.paper_files import TEXT_SIZES, WIDTH, text_config, text_weights, write_autoencoder, write_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    write_encoder(root / "clip", "clip")
    write_autoencoder(root / "flux2", "AutoencoderKLFlux2")
    return root


@pytest.fixture
def bring_text(tmp_path: Path, parts: Path) -> Bring:
    """Import into `tmp_path/out`, for pictures of 16×16 pixels, and return the progress messages."""

    def run(path: Path, **options: Any) -> list[str]:
        told: list[str] = []
        options = {"text_encoder": parts / "clip", "max_tokens": 8, "size": 16, "progress": told.append} | options
        import_checkpoint(path, parts / "flux2", tmp_path / "out", **options)
        return told

    return run


FORMS: dict[str, Callable[[], Any]] = {
    "params": text_config,
    "omegaconf": lambda: OmegaConf.create(text_config()),
    "flat": lambda: {"_target_": "somewhere.PatchForcingTransformerT2I", "compile": False, **TEXT_SIZES},
    "none": lambda: None,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_text_to_image_checkpoint_becomes_a_bundle(tmp_path: Path, bring_text: Bring, form: str) -> None:
    weights = text_weights()
    told = bring_text(save(tmp_path, FORMS[form](), weights))
    assert not [line for line in told if "weights say" in line]
    bundle = open_bundle(tmp_path / "out")
    manifest = bundle.manifest
    assert manifest.network.kind == "text"
    assert manifest.network.config.model_dump() == TEXT_SIZES | {"image_size": 8}
    assert (manifest.size, manifest.licence, manifest.class_names) == ((16, 16), TEXT_LICENCE, ())
    assert manifest.training["target"] == ("" if form == "none" else "somewhere.PatchForcingTransformerT2I")
    encoder = manifest.text_encoder
    assert isinstance(encoder, FolderEncoder)
    expected = ("clip", WIDTH, 8, False, "text_encoder")
    assert (encoder.kind, encoder.width, encoder.max_tokens, encoder.mask_padding, encoder.folder) == expected
    loaded = load_weights(bundle.weights)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_compiled_networks_names_are_read(tmp_path: Path, bring_text: Bring) -> None:
    weights = {f"_orig_mod.{name.replace('.ff.', '.ff._orig_mod.')}": each for name, each in text_weights().items()}
    bring_text(save(tmp_path, text_config(), weights))
    assert load_weights(tmp_path / "out" / "model.safetensors").keys() == text_weights().keys()


def test_the_imported_model_draws_alone_as_with_others(tmp_path: Path, bring_text: Bring) -> None:
    bring_text(save(tmp_path, text_config(), text_weights()))
    pipeline = Pipeline.open(tmp_path / "out", CPU)
    prompts = ["a red apple", "cat " * 20, "a cat on a mat"]
    together = pipeline.generate(prompts, seed=[1, 2, 3], steps=3)
    assert [pipeline.is_truncated(prompt) for prompt in prompts] == [False, True, False]
    for index, picture in enumerate(together.pictures):
        [alone] = pipeline.generate(prompts[index], seed=index + 1, steps=3).pictures
        assert picture.image.tobytes() == alone.image.tobytes()
    assert len({picture.image.tobytes() for picture in together.pictures}) == 3
    made = pipeline.generate("a cat", steps=3, negative_prompt="a red apple").pictures[0].image
    assert made.tobytes() != pipeline.generate("a cat", steps=3).pictures[0].image.tobytes()


def test_padding_may_be_masked(tmp_path: Path, bring_text: Bring) -> None:
    bring_text(save(tmp_path, text_config(), text_weights()))
    pictures = set()
    for masked in (False, True):
        path = tmp_path / "out" / "bundle.json"
        tree = json.loads(path.read_text())
        tree["text_encoder"]["mask_padding"] = masked
        path.write_text(json.dumps(tree))
        [picture] = Pipeline.open(tmp_path / "out", CPU).generate("a cat", steps=3).pictures
        pictures.add(picture.image.tobytes())
    assert len(pictures) == 2


def test_an_encoder_beside_the_bundle_is_shared(tmp_path: Path, bring_text: Bring) -> None:
    write_encoder(tmp_path / "shared", "t5")
    bring_text(save(tmp_path, text_config(), text_weights()), text_encoder=tmp_path / "shared")
    assert not (tmp_path / "out" / "text_encoder").exists()
    assert open_bundle(tmp_path / "out").text_encoder == tmp_path / "shared"
    Pipeline.open(tmp_path / "out", CPU)

    path = tmp_path / "shared" / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(BundleError, match="not the text encoder that out was made with"):
        Pipeline.open(tmp_path / "out", CPU)
    (tmp_path / "shared").rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="shared: no such folder"):
        open_bundle(tmp_path / "out")
    (tmp_path / "shared").symlink_to("/usr")
    with pytest.raises(BundleError, match="a link that leads out"):
        open_bundle(tmp_path / "out")


def test_a_bundle_written_again_keeps_its_encoder(tmp_path: Path, bring_text: Bring) -> None:
    bring_text(save(tmp_path, text_config(), text_weights()))
    bundle = open_bundle(tmp_path / "out")
    write_bundle(bundle.folder, bundle.manifest, load_weights(bundle.weights))
    Pipeline.open(tmp_path / "out", CPU)


@pytest.mark.parametrize("folder", ["../../encoder", "/encoder", "..", ".", "a/b", "../.hidden", ""])
def test_an_encoder_must_be_in_the_bundle_or_beside_it(tmp_path: Path, bring_text: Bring, folder: str) -> None:
    bring_text(save(tmp_path, text_config(), text_weights()))
    path = tmp_path / "out" / "bundle.json"
    tree = json.loads(path.read_text())
    tree["text_encoder"]["folder"] = folder
    path.write_text(json.dumps(tree))
    with pytest.raises(BundleError, match=r"text_encoder\.folder"):
        open_bundle(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"text_encoder": None}, "give the folder of its text encoder, --text-encoder"),
        ({"class_names": Path("imagenet")}, "has no classes"),
        ({"size": 17}, "--size 17 is not a multiple of the 2 pixels"),
        ({"size": 14}, "image_size 7 is not a multiple of patch_size"),
        ({"max_tokens": 2000}, "max_tokens"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_told(
    tmp_path: Path, bring_text: Bring, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BundleError, match=reason):
        bring_text(save(tmp_path, text_config(), text_weights()), **options)
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_another_width_is_refused(tmp_path: Path, bring_text: Bring) -> None:
    with pytest.raises(BundleError, match="txt_in_dim is 24, but the text encoder's width is 16"):
        bring_text(save(tmp_path, text_config(), text_weights(txt_in_dim=24)))


def test_an_autoencoder_of_another_number_of_channels_is_refused(tmp_path: Path, bring_text: Bring) -> None:
    with pytest.raises(BundleError, match=r"4 latent channels, but latent\.channels is 8"):
        bring_text(save(tmp_path, text_config(), text_weights(in_dim=8)))


def test_a_class_model_takes_no_text_encoder(ckpt: Path, bring_text: Bring) -> None:
    with pytest.raises(BundleError, match="class-conditional network, which has no text encoder"):
        bring_text(ckpt)


# --- checkpoints of training runs ---


def training_checkpoint(folder: Path, config: Any, weights: dict[str, torch.Tensor]) -> Path:
    """As Lightning writes it, with the averaged weights, an autoencoder's, and the optimiser's state."""
    state = {f"model.{name}": each + 1 for name, each in weights.items()}
    state |= {f"ema_model.{name}": each for name, each in weights.items()}
    state |= {"first_stage.bn.num_batches_tracked": torch.tensor(3), "ema_step": torch.tensor(7)}
    optimiser = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(
        {
            "epoch": 3,
            "global_step": 400_000,
            "pytorch-lightning_version": "2.5.1",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [optimiser],
            "lr_schedulers": [{"milestones": Counter({10: 1}), "lr_lambdas": [None]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"model": config, "lr": 1e-4},
        },
        folder / "last.ckpt",
    )
    return folder / "last.ckpt"


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path: Path, bring: Bring, wrap: Any) -> None:
    weights = tiny_weights()
    told = bring(training_checkpoint(tmp_path, wrap(config_tree()), weights))
    assert open_bundle(tmp_path / "out").manifest.network.config.model_dump() == SIZES
    loaded = load_weights(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert any("using the weights under ema_model." in line for line in told)


def test_a_text_models_training_checkpoint_draws(tmp_path: Path, bring_text: Bring) -> None:
    bring_text(training_checkpoint(tmp_path, OmegaConf.create(text_config()), text_weights()))
    assert isinstance(open_bundle(tmp_path / "out").manifest, BundleManifest)
    assert Pipeline.open(tmp_path / "out", CPU).generate("a cat", steps=2).pictures[0].image.size == (16, 16)


def test_settings_in_an_attribute_dict_are_read(tmp_path: Path, bring: Bring, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own kind of dict, which need not be installed to be read."""
    import sys
    from types import ModuleType

    module = ModuleType("lightning.fabric.utilities.data")
    kind = type("AttributeDict", (dict,), {"__module__": module.__name__})
    monkeypatch.setattr(module, "AttributeDict", kind, raising=False)
    with monkeypatch.context() as patch:
        for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__):
            patch.setitem(sys.modules, name, module if name == module.__name__ else ModuleType(name))
        path = training_checkpoint(tmp_path, kind(config_tree(num_heads=4)), tiny_weights())
    bring(path)
    assert open_bundle(tmp_path / "out").manifest.network.config.model_dump()["num_heads"] == 4

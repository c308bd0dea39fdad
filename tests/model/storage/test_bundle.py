"""What a bundle holds, and what is refused. A bad bundle raises BundleError and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file

from patchforge.model.errors import BundleError
from patchforge.model.shipped import BUNDLES, SHIPPED
from patchforge.model.storage import bundle as bundles
from patchforge.model.storage import files
from patchforge.model.storage.bundle import (
    AUTOENCODER_PREVIEW,
    Bundle,
    BundleManifest,
    find_bundles,
    list_bundles,
    load_weights,
    network_shapes,
    open_bundle,
    read_manifest,
    write_bundle,
    write_manifest,
)
from tests.model.model_files import DAMAGE, FUZZ, changed, class_manifest, damaged, random_weights, text_manifest


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    folder = tmp_path / "some-autoencoder"
    folder.mkdir()
    stages = {f"{coder}_block_out_channels": [8, 8, 8] for coder in ("encoder", "decoder")}
    blocks = {f"num_{coder}_blocks": [1, 1, 1] for coder in ("encoder", "decoder")}
    config = {"_class_name": "AutoencoderTiny", "latent_channels": 4, **stages, **blocks}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.ones(3)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def bundle(tmp_path: Path, autoencoder: Path) -> Path:
    folder = tmp_path / "bundles" / "tiny"
    manifest = BundleManifest.model_validate(class_manifest())
    write_bundle(folder, manifest, random_weights(manifest), autoencoder=autoencoder)
    return folder


def tiny_but_wide(manifest: BundleManifest) -> BundleManifest:
    """The same model, with tensors large enough to be stored in half precision."""
    return BundleManifest.model_validate(changed(manifest.model_dump(), "network.config.hidden_size", 64))


def rewrite(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "bundle.json").write_text(json.dumps(manifest))


# --- round trip ---


@pytest.mark.parametrize("tree", [class_manifest(), text_manifest()], ids=["class", "text"])
def test_a_bundle_reads_back_as_written(tmp_path: Path, autoencoder: Path, tree: dict[str, Any]) -> None:
    manifest = BundleManifest.model_validate(tree)
    weights = random_weights(manifest)
    write_bundle(tmp_path / "out", manifest, weights, autoencoder=autoencoder)

    found = open_bundle(tmp_path / "out")
    assert found.manifest == manifest
    assert found.manifest.grid == (4, 4)
    assert found.manifest.defaults.sampler.model_dump() == tree["defaults"]["sampler"]
    loaded = load_weights(found.weights, network_shapes(manifest.network))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert (found.autoencoder / "config.json").read_bytes() == (autoencoder / "config.json").read_bytes()


def test_sizes_are_written_only_if_there_are_any(tmp_path: Path) -> None:
    assert "sizes" not in BundleManifest.model_validate(TEXT).model_dump_json()
    rewrite(tmp_path, TEXT | {"sizes": [[16, 16], [64, 16]]})
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.native_sizes == ((32, 32), (16, 16), (64, 16))
    assert [manifest.grid_of(size) for size in manifest.native_sizes] == [(4, 4), (2, 2), (2, 8)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_tensors_are_stored_narrow_small_ones_exactly(tmp_path: Path, dtype: torch.dtype, bundle: Path) -> None:
    manifest = tiny_but_wide(read_manifest(bundle))
    weights = random_weights(manifest)
    write_bundle(bundle, manifest, weights, dtype)

    stored = load_weights(bundle / "model.safetensors")
    assert stored["blocks.0.mlp.fc1.weight"].dtype == dtype
    assert torch.equal(stored["blocks.0.mlp.fc1.bias"], weights["blocks.0.mlp.fc1.bias"])
    upcast = load_weights(bundle / "model.safetensors", dtype=torch.float32)
    assert {tensor.dtype for tensor in upcast.values()} == {torch.float32}
    assert torch.allclose(upcast["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"], rtol=1e-2)


def test_replacing_a_bundle_keeps_its_autoencoder_and_leaves_no_litter(bundle: Path) -> None:
    manifest = read_manifest(bundle).model_copy(update={"description": "better"})
    write_bundle(bundle, manifest, random_weights(manifest))
    assert open_bundle(bundle).manifest.description == "better"
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]


def test_a_failed_write_leaves_the_old_bundle(bundle: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    manifest = read_manifest(bundle)
    weights = random_weights(manifest)
    weights["pos_embed"][0, 0, 0] = float("nan")
    with pytest.raises(BundleError, match="pos_embed holds NaN"):
        write_bundle(bundle, manifest.model_copy(update={"description": "worse"}), weights)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["tiny"]


def test_a_value_too_large_for_the_dtype_is_refused(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    weights = random_weights(manifest)
    weights["t_embedder.mlp.0.weight"] = torch.full((16, 256), 1e6)
    write_bundle(bundle, manifest, weights, torch.float16)  # small enough to stay float32
    wide = tiny_but_wide(manifest)
    weights = random_weights(wide)
    weights["blocks.0.mlp.fc1.weight"][0, 0] = 1e6
    with pytest.raises(BundleError, match=r"fc1\.weight holds NaN or infinite"):
        write_bundle(bundle, wide, weights, torch.float16)


def test_weights_of_another_network_are_not_written(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    with pytest.raises(BundleError, match="do not fit the network"):
        write_bundle(bundle, manifest, random_weights(tiny_but_wide(manifest)))


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, bundle: Path, autoencoder: Path) -> None:
    manifest = read_manifest(bundle)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(tmp_path / "mine", manifest, {}, autoencoder=autoencoder)
    assert (tmp_path / "mine" / "diary.txt").exists()


# --- bundle.json ---

CLASS, TEXT = class_manifest(), text_manifest()
BAD_FIELDS = [
    (CLASS, "format_version", 2, "format_version"),
    (CLASS, "name", "../escape", "name"),
    (CLASS, "name", "Tiny Model", "name"),
    (CLASS, "surprise", 1, "surprise"),
    (CLASS, "licence", "", "licence"),
    (CLASS, "created", "yesterday", "created"),
    (CLASS, "network.kind", "diffusion", "network"),
    (CLASS, "network.config.depth", 10**9, "network.config.depth"),
    (CLASS, "network.config.depth", "1", "network.config.depth"),
    (CLASS, "network.config.depth", ..., "network.config.depth"),
    (CLASS, "network.config.num_heads", 3, "hidden_size 16 is not a multiple of num_heads"),
    (CLASS, "network.config.num_classes", 3, "class_names"),
    (CLASS, "network.config.in_channels", 8, "latent.channels"),
    (CLASS, "network.config.input_size", 16, "latent.height"),
    (CLASS, "class_names", ["cat", "cat"], "'cat' occurs twice"),
    (CLASS, "class_names", ["cat", "a\nb"], "class_names.1"),
    (CLASS, "latent.mean", [0.0], "mean has 1 values for 4 channels"),
    (CLASS, "latent.std", [0.0, 1.0, 1.0, 1.0], "latent.std.0"),
    (CLASS, "autoencoder.downscale", 1000, "autoencoder.downscale"),
    (CLASS, "autoencoder.folder", "../../etc", "autoencoder.folder"),
    (CLASS, "defaults.sampler", {"quantile": 0.4}, "defaults.sampler.name"),
    (CLASS, "defaults.sampler.quantile", [1], "defaults.sampler.quantile"),
    (CLASS, "defaults.steps", 0, "defaults.steps"),
    (CLASS, "defaults.guidance", float("nan"), "defaults.guidance"),
    (CLASS, "text_encoder", {"kind": "minilm", "max_tokens": 8, "mask_padding": True}, "text_encoder"),
    (TEXT, "text_encoder", None, "text_encoder"),
    (TEXT, "text_encoder.kind", "os.system", "text_encoder: Input tag"),
    (TEXT, "network.config.txt_in_dim", 20, "txt_in_dim"),
    (TEXT, "network.config.head_dim", 4, "head_dim"),
    (TEXT, "class_names", ["cat"], "class_names"),
    (CLASS, "sizes", [[16, 16]], "sizes: a class-conditional network has one size"),
    (TEXT, "sizes", [[16, 20]], "sizes: 16x20 is not a multiple of a patch's 8 pixels"),
    (TEXT, "sizes", [[64, 32]], "sizes: 64x32 has more patches than the model's own size"),
    (TEXT, "sizes", [[32, 32]], "sizes must differ"),
    (TEXT, "sizes", [[16, 16], [16, 16]], "sizes must differ"),
    (TEXT, "sizes", [[0, 16]], "sizes.0.0"),
    (TEXT, "sizes", [["16", 16]], "sizes.0.0"),
    (TEXT, "sizes", [[16, 16, 3]], "sizes.0"),
    (TEXT, "sizes", [[8, 8 * side] for side in range(1, 18)], "sizes"),
]


@pytest.mark.parametrize(
    ("tree", "path", "value", "named"), BAD_FIELDS, ids=[f"{b[1]}={b[2]!r:.20}" for b in BAD_FIELDS]
)
def test_a_bad_field_is_named(tmp_path: Path, tree: dict[str, Any], path: str, value: Any, named: str) -> None:
    rewrite(tmp_path, changed(tree, path, value))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert "bundle.json" in str(caught.value)
    assert named in str(caught.value)


def test_sizes_that_pass_one_by_one_are_refused_together(tmp_path: Path) -> None:
    huge = {"depth": 128, "hidden_size": 8192, "num_heads": 64}
    tree = class_manifest()
    tree["network"]["config"] |= huge
    rewrite(tmp_path, tree)
    with pytest.raises(BundleError, match="parameters; at most"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOF"),
        (b"[1]", "object"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "recursion"),
        (b" " * (9 << 20), "more than"),
    ],
    ids=["empty", "list", "not-utf8", "deep", "long"],
)
def test_a_bundle_json_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=reason):
        read_manifest(tmp_path)


# --- folders ---


def test_bundles_are_listed_by_name(tmp_path: Path, bundle: Path, autoencoder: Path) -> None:
    other = BundleManifest.model_validate(text_manifest(name="another"))
    write_bundle(bundle.parent / "second", other, random_weights(other), autoencoder=autoencoder)
    (bundle.parent / "notes").mkdir()
    (bundle.parent / ".hidden").mkdir()
    (bundle.parent / ".hidden" / "bundle.json").write_text("{}")
    assert [found.name for found in list_bundles(bundle.parent)] == ["another", "tiny"]


def test_two_bundles_of_one_name_are_refused(bundle: Path, autoencoder: Path) -> None:
    manifest = read_manifest(bundle)
    write_bundle(bundle.parent / "copy", manifest, random_weights(manifest), autoencoder=autoencoder)
    with pytest.raises(BundleError, match="rename one"):
        list_bundles(bundle.parent)


def test_bundles_of_several_places_are_found_together(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(bundle, own / "mine")
    write_manifest(own / "mine", read_manifest(own / "mine").model_copy(update={"name": "mine"}))
    shipped = {each.name for each in list_bundles(BUNDLES)}
    found = find_bundles([own, bundle, bundle.parent, SHIPPED])
    assert found.keys() == {"mine", read_manifest(bundle).name, *shipped}
    shutil.copytree(own / "mine", tmp_path / "more" / "mine")
    with pytest.raises(BundleError, match="has the same name as"):
        find_bundles([own, tmp_path / "more"])


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, bundle: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(bundle, target_is_directory=True)
    with pytest.raises(BundleError, match="leads out"):
        list_bundles(root)


@pytest.mark.parametrize("name", ["bundle.json", "model.safetensors", "autoencoder/config.json", "autoencoder"])
def test_links_out_of_a_bundle_are_not_followed(tmp_path: Path, bundle: Path, name: str) -> None:
    (bundle / name).rename(tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leads out"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name",
    ["bundle.json", "model.safetensors", "autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"],
)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name.split("/")[-1]):
        open_bundle(bundle)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        list_bundles(tmp_path / "nowhere")


TWO_STAGES = {f"{coder}_block_out_channels": [8, 8] for coder in ("encoder", "decoder")}
TWO_STAGES |= {f"num_{coder}_blocks": [1, 1] for coder in ("encoder", "decoder")}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name"),
        ({"latent_channels": 16}, "latent channels"),
        (TWO_STAGES, "scales down by 2"),
        ({"encoder_block_out_channels": [8, 8]}, "num_encoder_blocks has 3 entries"),
        ({"encoder_block_out_channels": [10**9] * 3}, r"json: encoder_block_out_channels\.0: "),
        ({"decoder_block_out_channels": [8, 8, 16]}, "decoder_block_out_channels"),
        ({"num_decoder_blocks": [1, 1, 4096]}, r"num_decoder_blocks\.2"),
        ({"act_fn": "eval"}, "act_fn"),
        ({"act_fn": 3}, "act_fn"),
        ({"upsampling_scaling_factor": 10**9}, "upsampling_scaling_factor"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(bundle: Path, change: dict[str, Any], reason: str) -> None:
    path = bundle / "autoencoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=reason):
        open_bundle(bundle)


# --- damage ---


@FUZZ
@given(**DAMAGE)
def test_a_damaged_bundle_json_raises_bundle_errors_only(
    tmp_path: Path, cut: float, changes: list[tuple[float, int]]
) -> None:
    (tmp_path / "bundle.json").write_bytes(damaged(json.dumps(class_manifest()).encode(), cut, changes))
    with suppress(BundleError):
        read_manifest(tmp_path)


# --- identity ---


def test_a_copy_of_a_bundle_has_the_same_digest(tmp_path: Path, bundle: Path) -> None:
    digest = open_bundle(bundle).digest
    (bundle / "notes.txt").write_text("not part of the model")
    shutil.copytree(bundle, tmp_path / "elsewhere")
    assert open_bundle(tmp_path / "elsewhere").digest == open_bundle(bundle).digest == digest


def test_every_file_that_is_read_counts_in_the_digest(bundle: Path) -> None:
    shutil.copy(
        bundle / "autoencoder" / "diffusion_pytorch_model.safetensors", bundle / "autoencoder" / AUTOENCODER_PREVIEW
    )
    digests = {open_bundle(bundle).digest}
    counted = sorted(path for path in bundle.rglob("*") if path.is_file())
    for path in counted:
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        digests.add(Bundle(bundle, BundleManifest.model_validate(class_manifest())).digest)
        path.write_bytes(before)
    (bundle / "autoencoder" / AUTOENCODER_PREVIEW).unlink()
    digests.add(open_bundle(bundle).digest)
    assert len(counted) == 5
    assert len(digests) == len(counted) + 2


def test_anyone_can_compute_the_digest(bundle: Path) -> None:
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    lines = "".join(f"{name} {hashlib.sha256((bundle / name).read_bytes()).hexdigest()}\n" for name in names)
    assert open_bundle(bundle).digest == hashlib.sha256(lines.encode()).hexdigest()


def test_the_weights_are_read_once_for_both_their_hash_and_the_digest(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hash_file = files.hash_file
    monkeypatch.setattr(bundles, "hash_file", lambda path: read.append(path.name) or hash_file(path))
    found = open_bundle(bundle)
    assert len({found.weights_sha256, found.digest, found.digest}) == 2
    assert sorted(read) == ["bundle.json", "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"]

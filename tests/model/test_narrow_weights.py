"""Large networks whose weights are stored in 16 bits stay so in memory, and draw what they drew in float32."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from patchforge.model.device import compile_feed_forwards
from patchforge.model.experiments.sampler_bench import picture_psnr
from patchforge.model.networks.row_wise import product_weights
from patchforge.model.pipeline import Pipeline
from patchforge.model.storage.bundle import load_weights, open_bundle, write_bundle
from tests.rounding import products_are_alike

KINDS = pytest.mark.parametrize("kind", ["class", "text"])
WORDS = ["cat", "dog", "cat"]
SETTINGS = {"steps": 3, "sampler": "dual_loop"}


@contextmanager
def large(parameters: int) -> Iterator[None]:
    """Count networks of more than so many parameters as large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchforge.model.storage.bundle.LARGE", parameters)
        yield


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def narrow(request: pytest.FixtureRequest, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundles with all weights in 16 bits, small tensors too, as if they were large ones."""
    root: Path = tmp_path_factory.mktemp("narrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchforge.model.storage.weights.KEEP_FLOAT32", 0)
        for kind in ("class", "text"):
            of = open_bundle(bundle_dir / f"tiny-{kind}")
            autoencoder = of.autoencoder
            write_bundle(root / kind, of.manifest, load_weights(of.weights), request.param, autoencoder=autoencoder)
    return root


def pictures(pipeline: Pipeline) -> torch.Tensor:
    made = pipeline.generate(WORDS, seed=[1, 2, 3], **SETTINGS)
    return torch.stack([torch.frombuffer(bytearray(each.image.tobytes()), dtype=torch.uint8) for each in made.pictures])


def bytes_of(pipeline: Pipeline) -> int:
    return sum(each.nbytes for each in pipeline.network.state_dict().values())


@KINDS
def test_a_large_network_takes_half_the_memory_and_draws_the_same_bits(kind: str, narrow: Path) -> None:
    wide = Pipeline.open(narrow / kind)
    with large(0):
        kept = Pipeline.open(narrow / kind)
    stored = {each.dtype for each in load_weights(narrow / kind / "model.safetensors").values()}
    products = product_weights(kept.network)
    state = kept.network.state_dict()
    assert {state[name].dtype for name in products} == stored
    assert {each.dtype for name, each in state.items() if name not in products} == {torch.float32}
    saved = sum(state[name].nbytes for name in products)
    assert bytes_of(kept) == bytes_of(wide) - saved
    assert saved > 0.3 * bytes_of(wide), "the products are most of a network"
    assert torch.equal(pictures(kept), pictures(wide))


@KINDS
def test_its_pictures_are_near_those_of_float32_weights(
    kind: str, narrow: Path, pipelines: dict[str, Pipeline]
) -> None:
    with large(0):
        kept = Pipeline.open(narrow / kind)
    exact = pictures(pipelines[f"tiny-{kind}"])
    assert not torch.equal(exact, pictures(kept))
    assert picture_psnr(exact, pictures(kept)) > 30


@KINDS
def test_a_picture_is_the_same_alone_and_packed(kind: str, narrow: Path) -> None:
    if not products_are_alike():
        pytest.skip("this machine's matrix products depend on the number of rows, even of whole blocks")
    with large(0):
        kept = Pipeline.open(narrow / kind)
    packed = kept.generate(WORDS, seed=[1, 2, 3], **SETTINGS)
    for word, seed, picture in zip(WORDS, (1, 2, 3), packed.pictures, strict=True):
        assert kept.generate(word, seed=seed, **SETTINGS).pictures[0].image.tobytes() == picture.image.tobytes()


@KINDS
def test_bf16_products_take_the_weights_as_they_are(kind: str, narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_PRECISION", "bfloat16")
    wide = Pipeline.open(narrow / kind)
    with large(0):
        kept = Pipeline.open(narrow / kind)
    assert {kept.network.state_dict()[name].dtype for name in product_weights(kept.network)} == {torch.bfloat16}
    assert torch.equal(pictures(kept), pictures(wide))


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_it_can_be_compiled(narrow: Path) -> None:
    with large(0):
        plain, compiled = (Pipeline.open(narrow / "class") for _ in range(2))
    compile_feed_forwards(compiled.network)
    assert picture_psnr(pictures(plain), pictures(compiled)) > 40


def test_small_networks_do_not_convert_at_every_product(narrow: Path) -> None:
    assert {each.dtype for each in Pipeline.open(narrow / "class").network.parameters()} == {torch.float32}

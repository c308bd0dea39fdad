"""Checkpoints in the paper's forms, with each text encoder and autoencoder: imported, served and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import grpc
import httpx
import pytest
from PIL import Image

from patchforge.model.storage.import_checkpoint import import_checkpoint
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from tests.e2e.conftest import Served, start
from tests.model.model_files import config_tree, save, tiny_weights
from tests.paper_files import text_config, text_weights, write_autoencoder, write_encoder
from tests.patience import PATIENCE
from tests.processes import PATCHFORGE, run

ENCODERS = {
    "clip": "AutoencoderKLFlux2",
    "gemma": "AutoencoderKLFlux2",
    "qwen3_vl": "AutoencoderKLFlux2",
    "siglip": "AutoencoderKL",
    "t5": "AutoencoderTiny",
}
TEXT = {"prompt": "a red apple", "seed": 5, "steps": 2}
CLASS = {"class_label": "Golden Retriever", "seed": 5, "steps": 2}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for each text encoder, and `names`, with the classes of ImageNet, by the command."""
    root, parts = tmp_path_factory.mktemp("bundles"), tmp_path_factory.mktemp("parts")
    for kind in {*ENCODERS.values()}:
        write_autoencoder(parts / kind, kind)
    text = save(parts, text_config(), text_weights())
    for encoder, autoencoder in ENCODERS.items():
        write_encoder(parts / encoder, encoder, whole=True, shard_size="5KB")
        folders = {"autoencoder": parts / autoencoder, "text_encoder": parts / encoder}
        import_checkpoint(text, out=root / encoder, max_tokens=8, size=16, **folders)
    classes = save(parts, config_tree(num_classes=1000), tiny_weights(num_classes=1000))
    words = ["--autoencoder", parts / "AutoencoderKL", "--out", root / "names", "--class-names", "imagenet"]
    told = run(*PATCHFORGE, "import-checkpoint", classes, *words)
    assert told.stdout.endswith("names: names, class-conditional\n")
    return root


@pytest.fixture(scope="module")
def served(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = start(tmp_path_factory.mktemp("data"), PATCHFORGE_BUNDLE_DIR=str(bundles))
    yield running
    running.close()


def opened(data: bytes) -> bytes:
    picture = Image.open(BytesIO(data))
    assert picture.size == (16, 16)
    return picture.convert("RGB").tobytes()


def offline(bundles: Path, out: Path, model: str, words: str) -> bytes:
    settings = ["--seed", "5", "--steps", "2", "--bundle", bundles / model, "--out", out]
    run(*PATCHFORGE, "generate", words, *settings)
    return opened(next(out.glob("*.png")).read_bytes())


@pytest.mark.parametrize("model", [*ENCODERS, "names"])
def test_every_protocol_and_the_command_line_draw_the_same_picture(
    served: Served, bundles: Path, tmp_path: Path, model: str
) -> None:
    wanted = {"model": model} | (CLASS if model == "names" else TEXT)
    with httpx.Client(base_url=served.http, timeout=PATIENCE) as http:
        job = http.post("/v1/jobs", json=wanted).raise_for_status().json()
        with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
            assert b"event: completed" in events.read()
        by_rest = opened(http.get(f"/v1/jobs/{job['id']}/image").raise_for_status().content)
        source = {"prompt": wanted.get("prompt") or "golden retriever", "model": model, "strength": 0.5}
        files = {"image": ("source.png", http.get(f"/v1/jobs/{job['id']}/image").content, "image/png")}
        edited = http.post("/v1/images/edits", data=source | {"response_format": "b64_json"}, files=files)
        assert edited.status_code == 200, edited.text
    with grpc.insecure_channel(served.grpc) as channel:
        request = pb.GenerateImageRequest(generation=pb.Generation(**wanted))
        images = [reply.event.image for reply in ImageServiceStub(channel).GenerateImage(request, timeout=PATIENCE)]
    by_grpc = [opened(image.data) for image in images if image.data]
    assert by_grpc == [by_rest]
    assert offline(bundles, tmp_path, model, str(wanted.get("prompt") or "golden retriever")) == by_rest

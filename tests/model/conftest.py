"""Fixtures of the model tests: an autoencoder folder, a checkpoint and its import, a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from patchforge.model.storage.import_checkpoint import import_checkpoint
from tests.model.model_files import Bring, config_tree, save, tiny_weights

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **stages).save_pretrained(folder)
    return folder


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return save(tmp_path, config_tree(), tiny_weights())


@pytest.fixture
def bring(tmp_path: Path, autoencoder: Path) -> Bring:
    """Import into `tmp_path/out`, and return the progress messages."""

    def run(path: Path, **options: Any) -> list[str]:
        told: list[str] = []
        import_checkpoint(path, autoencoder, tmp_path / "out", progress=told.append, **options)
        return told

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of plain pictures; some have captions."""
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(30):
            shade = tuple(min(255, value + number) for value in colour)
            Image.new("RGB", (40, 30), shade).save(root / name / f"{name}-{number}.png")
    (root / "red" / "red-0.txt").write_text("a red square\nsomething red\n")
    return root

"""Memory of models, each in a process of its own: what it measures is there, and more than the weights alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
import torch

from patchforge.model.errors import BundleError
from patchforge.model.experiments import memory_bench
from patchforge.model.experiments.memory_bench import bench_memory, peak_bytes
from patchforge.model.networks.config import ClassConfig
from patchforge.model.pipeline import Pipeline
from patchforge.model.shipped import BUNDLES
from patchforge.model.storage.bundle import open_bundle

SMALL = ClassConfig(in_channels=4, input_size=32, depth=2, hidden_size=512, patch_size=2, num_heads=4, num_classes=10)


def test_a_row_says_what_its_own_process_took() -> None:
    held = torch.ones(600 << 20, dtype=torch.uint8)  # of this process, and not of that one
    row = next(bench_memory(BUNDLES / "emoji-class", [], 1, 1))
    del held
    assert (row.model, row.stored, row.products) == ("emoji-class", "float16", "float32")
    figures = row.figures
    assert figures.imported < figures.loaded <= figures.peak < 2 << 30
    assert row.weights < figures.loaded - figures.imported, "float32 in memory, 16 bits in the file"
    assert figures.imported < 600 << 20
    assert min(figures.ready_seconds, figures.seconds, figures.processor_seconds) > 0


def test_random_bundles_have_the_size_and_type_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A network and an autoencoder of a few megabytes stand for the paper's."""
    monkeypatch.setitem(memory_bench.SIZES, "PFT-B", SMALL)
    monkeypatch.setitem(memory_bench.STABLE_DIFFUSION, "block_out_channels", (32, 32, 32, 32))
    memory_bench._write_autoencoder(tmp_path / "autoencoder")
    memory_bench.write_random_bundle(tmp_path / "made", "PFT-B", torch.bfloat16, tmp_path / "autoencoder")
    assert memory_bench._stored_type(tmp_path / "made") == "bfloat16"
    pipeline = Pipeline.open(tmp_path / "made")
    assert pipeline.manifest.size == (256, 256)
    values = sum(each.numel() for each in pipeline.network.parameters())
    assert values == pytest.approx(SMALL.parameters, rel=0.05)
    assert open_bundle(tmp_path / "made").weights.stat().st_size == pytest.approx(2 * values, rel=0.1)


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(BUNDLES / "emoji-class", broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(BundleError, match=r"emoji-class in .*: its process failed: .*model\.safetensors"):
        memory_bench._measure(broken, "emoji-class", "float16", "float32", 1, 1)


def test_the_peak_stays_when_memory_is_freed() -> None:
    more = bytearray(b"x") * (256 << 20)
    resident = psutil.Process().memory_info().rss - (16 << 20)  # the kernel counts both with some delay
    assert peak_bytes() >= resident
    del more
    assert peak_bytes() >= resident

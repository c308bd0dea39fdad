"""Memory and time of large networks, as a worker loads and evaluates them: one child process for each figure.

Weights are random, because only sizes and types matter. A process's peak never falls, so each model and precision has a
process of its own. The children run this file.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from patchforge.model.errors import BundleError
from patchforge.model.experiments.forward_bench import SIZES
from patchforge.model.storage.bundle import network_shapes, open_bundle, write_streamed_bundle
from patchforge.model.storage.manifest import BundleManifest, ClassNetwork

WAYS = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
"""Type of the stored weights, and of the matrix products."""
STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Sizes of the autoencoder that the paper's class-conditional models use."""
SCALE = 0.02
"""Of random weights, so that no value of the network grows without bound."""


@dataclass(frozen=True)
class Figures:
    """What a child process measured of itself. Bytes are of the whole process."""

    imported: int
    """Peak once everything is imported, before anything is loaded."""
    loaded: int
    """Peak once network and autoencoder are loaded."""
    peak: int
    """Peak after the evaluations."""
    ready_seconds: float
    """Processor time from the start of the process until everything is loaded."""
    seconds: float
    """The best evaluation of one guided picture, all its patches."""
    processor_seconds: float
    """Its processor time, of all threads: it hardly depends on what else the machine does."""


@dataclass(frozen=True)
class MemoryRow:
    """One model, the type of its stored weights, and that of its matrix products."""

    model: str
    stored: str
    products: str
    parameters: int
    """Of the network, as counted from its sizes."""
    weights: int
    """Bytes of the files with the weights of network and autoencoder. No process that holds them takes less."""
    figures: Figures


def bench_memory(shipped: Path, sizes: list[str], rounds: int, threads: int | None) -> Iterator[MemoryRow]:
    """Measure the bundle `shipped`, then random networks of the released `sizes`, in all `WAYS`.

    Raises:
        BundleError: a child process failed, for instance for want of memory.
    """
    for products in ("float32", "bfloat16"):
        yield _measure(shipped, open_bundle(shipped).name, _stored_type(shipped), products, rounds, threads)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if sizes:
            _write_autoencoder(root / "autoencoder")
        for size in sizes:
            for stored in dict.fromkeys(stored for stored, _ in WAYS):
                bundle = root / "bundle"  # only one lies on the disk at a time: large ones take gigabytes
                write_random_bundle(bundle, size, getattr(torch, stored), root / "autoencoder")
                for products in [products for of, products in WAYS if of == stored]:
                    yield _measure(bundle, size, stored, products, rounds, threads)


def write_random_bundle(folder: Path, size: str, dtype: torch.dtype, autoencoder: Path) -> None:
    """Write or replace a bundle of random weights of a released size, with one tensor in memory at a time."""
    config = SIZES[size]
    manifest = BundleManifest.model_validate(
        {
            "name": size.lower(),
            "network": {"kind": "class", "config": config.model_dump()},
            "latent": {"channels": 4, "height": 32, "width": 32, "mean": [0.0] * 4, "std": [1.0] * 4},
            "autoencoder": {"downscale": 8},
            "class_names": [str(number) for number in range(config.num_classes)],
            "licence": "none: random weights",
            "defaults": {"sampler": {"name": "euler"}, "steps": 2, "guidance": 2.0},
            "created": 0,
        }
    )
    shapes = network_shapes(ClassNetwork(config=config))
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator) * SCALE

    write_streamed_bundle(folder, manifest, shapes, draw, dtype, autoencoder=autoencoder)


def _write_autoencoder(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(**STABLE_DIFFUSION).save_pretrained(folder)


def _stored_type(bundle: Path) -> str:
    """The type of a bundle's largest weight, as its file says."""
    from safetensors import safe_open

    codes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with safe_open(open_bundle(bundle).weights, framework="pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a mapping)
        largest = max(slices, key=lambda each: torch.Size(each.get_shape()).numel())
        return codes[largest.get_dtype()]


def _measure(bundle: Path, model: str, stored: str, products: str, rounds: int, threads: int | None) -> MemoryRow:
    found = open_bundle(bundle)
    command = [sys.executable, "-P", "-m", __spec__.name, str(bundle), str(rounds), str(threads or 0)]
    environment = os.environ | {"PATCHFORGE_PRECISION": products, "PATCHFORGE_DEVICE": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        why = ran.stderr.strip().splitlines()[-1:] or [f"status {ran.returncode}: too little memory?"]
        raise BundleError(f"{model} in {stored}: its process failed: {why[0]}")
    files = (found.weights, *found.autoencoder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    parameters = found.manifest.network.config.parameters
    return MemoryRow(model, stored, products, parameters, size, Figures(**json.loads(ran.stdout)))


def measure_here(bundle: Path, rounds: int, threads: int | None) -> dict[str, Any]:
    """Load a bundle as a worker does, evaluate one guided picture, and return `Figures`. For a process of its own."""
    from patchforge.model.denoiser import Evaluation, Memory
    from patchforge.model.device import prepare_cpu
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.types import Plan

    prepare_cpu(threads, only_pictures=True)
    import diffusers.models  # noqa: F401 (what loading an autoencoder imports, so that it does not count as weights)

    imported = peak_bytes()
    pipeline = Pipeline.open(bundle)
    loaded, ready = peak_bytes(), time.process_time()
    plan = Plan(pipeline.noise(0), (0.5,), guidance=2.0)
    one = Evaluation(plan, pipeline.condition_on(pipeline.manifest.class_names[0]), Memory())
    seconds, processor = [], []
    for _ in range(rounds + 1):  # the first includes one-time set-up
        began = time.perf_counter(), time.process_time()
        pipeline.denoiser.evaluate([one])
        seconds.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    return asdict(Figures(imported, loaded, peak_bytes(), ready, min(seconds[1:]), min(processor[1:])))


def peak_bytes() -> int:
    """The most resident memory that this process has had, in bytes.

    Linux counts in `ru_maxrss` what the parent had before it started this process, so `VmHWM` is read there.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    print(json.dumps(measure_here(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) or None)))

"""Compiled networks give the same results, and freed memory is reused."""

import platform
import shutil
import warnings
from copy import deepcopy

import pytest
import torch

from patchforge.model.denoiser import Denoiser, Evaluation, Memory
from patchforge.model.device import best_device, compile_feed_forwards, serving_dtype
from patchforge.model.errors import DeviceError
from patchforge.model.experiments.sampler_bench import picture_psnr
from patchforge.model.networks.row_wise import Linear
from patchforge.model.pipeline import Pipeline
from patchforge.model.types import Plan
from tests.model.tiny_networks import class_conditions, class_network, text_denoiser
from tests.processes import PYTHON, run


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["class", "text"])
def test_compiled_feed_forwards_predict_the_same_for_packs_of_any_size(kind: str) -> None:
    plain, [condition, *_] = text_denoiser() if kind == "text" else (Denoiser(class_network()), class_conditions())
    compiled = Denoiser(deepcopy(plain.network))
    compile_feed_forwards(compiled.network)
    for pictures in (1, 2, 5):
        latents = [plain.grid.patchify(torch.randn(plain.grid.latent_shape)) for _ in range(pictures)]
        plans = [Plan(latent, (0.1 * number,), guidance=2.0) for number, latent in enumerate(latents)]
        with warnings.catch_warnings(action="ignore"):  # warnings about the compiler's own code
            one, other = (
                each.evaluate([Evaluation(plan, condition, Memory()) for plan in plans]) for each in (plain, compiled)
            )
        for expected, found in zip(one, other, strict=True):
            torch.testing.assert_close(found.velocity, expected.velocity, atol=1e-5, rtol=0)


FREED = """
import sys
from pathlib import Path
import torch
from patchforge.model.device import keep_freed_memory


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])


if sys.argv[1] == "kept":
    keep_freed_memory()
torch.ones(1)
before = resident()
large = torch.ones(6, 1 << 20)  # 24 MiB: its own mapping by default
used = resident() - before
del large
print((resident() - before) / used)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_was_freed_is_kept() -> None:
    def share_kept(how: str) -> float:
        return float(run(*PYTHON, FREED, how).stdout)

    assert share_kept("given back") < 0.1
    assert share_kept("kept") > 0.9


def test_the_device_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_DEVICE", "cpu")
    assert best_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert best_device() == torch.device("cpu"), "the name comes first"
    monkeypatch.setenv("PATCHFORGE_DEVICE", "auto")
    assert best_device() == torch.device("xpu")
    monkeypatch.delenv("PATCHFORGE_DEVICE")
    assert best_device() == torch.device("xpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_does_not_work_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_DEVICE", name)
    with pytest.raises(DeviceError, match=f"device '{name}' cannot be used here: "):
        best_device()


def test_precision_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("patchforge.model.device.has_fast_bf16", lambda device: True)
    assert (serving_dtype(cpu), serving_dtype(cuda)) == (torch.float32, torch.bfloat16)
    monkeypatch.setenv("PATCHFORGE_PRECISION", "float32")
    assert serving_dtype(cuda) is torch.float32
    monkeypatch.setenv("PATCHFORGE_PRECISION", "bfloat16")
    assert serving_dtype(cpu) is torch.bfloat16
    monkeypatch.setenv("PATCHFORGE_PRECISION", "int4")
    with pytest.raises(DeviceError, match="auto, float32, bfloat16"):
        serving_dtype(cpu)


@pytest.mark.parametrize("name", ["emoji-class", "emoji-text"])
def test_bf16_draws_the_same_picture_with_weights_converted_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Pipeline.open(name)
    monkeypatch.setenv("PATCHFORGE_PRECISION", "bfloat16")
    rough = Pipeline.open(name)
    products = [each for each in rough.network.get_submodule("blocks").modules() if isinstance(each, Linear)]
    assert {each.weight.dtype for each in products} == {torch.bfloat16}
    assert rough.denoiser.pool.dtype is torch.bfloat16
    assert {each.dtype for each in exact.network.parameters()} == {torch.float32}
    words = exact.manifest.class_names[5] if exact.manifest.class_names else "red apple"
    made = [
        each.sample(each.sampler("euler", steps=4, guidance=2.0), [each.condition_on(words)], [0])[0]
        for each in (exact, rough)
    ]
    assert not torch.equal(*made)
    assert picture_psnr(*made) > 30

"""Compiled networks say what the others say, and memory is used again."""

import platform
import shutil
import subprocess
import sys
import warnings
from copy import deepcopy

import pytest
import torch

from model.denoiser import Denoiser, Evaluation, Memory
from model.device import compile_feed_forwards
from model.types import Plan
from tests.model.networks import class_conditions, class_network, text_denoiser


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["class", "text"])
def test_compiled_feed_forwards_predict_the_same_for_packs_of_any_size(kind: str) -> None:
    plain, [condition, *_] = text_denoiser() if kind == "text" else (Denoiser(class_network()), class_conditions())
    compiled = Denoiser(deepcopy(plain.network))
    compile_feed_forwards(compiled.network)
    for pictures in (1, 2, 5):
        latents = [plain.grid.patchify(torch.randn(plain.grid.latent_shape)) for _ in range(pictures)]
        plans = [Plan(latent, (0.1 * number,), guidance=2.0) for number, latent in enumerate(latents)]
        with warnings.catch_warnings(action="ignore"):  # the compiler has its own opinions on itself
            one, other = (
                each.evaluate([Evaluation(plan, condition, Memory()) for plan in plans]) for each in (plain, compiled)
            )
        for expected, found in zip(one, other, strict=True):
            torch.testing.assert_close(found.velocity, expected.velocity, atol=1e-5, rtol=0)


FAULTS = """
import resource, sys
import torch
from model.device import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)


def work():
    x = torch.ones(512, 768)
    for _ in range(20):
        x = torch.sigmoid(x * (1 + x.square()))
    return [torch.ones(512, 1152) for _ in range(20)]


for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_was_freed_is_used_again() -> None:
    def page_faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert page_faults("given back") > 10_000
    assert page_faults("kept") < 1000

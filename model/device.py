"""Choose the device and the precision, and prepare the process for them."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn

from patchforge.model.errors import DeviceError
from patchforge.model.parallel import default_threads, use_threads

PRECISIONS = ("auto", "float32", "bfloat16")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameter numbers of glibc's `mallopt`."""
KEPT_BYTES = 1 << 30
"""Free bytes at the end of the heap that glibc keeps before it returns memory to the system."""
LARGEST_KEPT = 32 << 20
"""The largest `M_MMAP_THRESHOLD` that glibc accepts, in bytes."""


def best_device() -> torch.device:
    """Return the device that `PATCHFORGE_DEVICE` names, or this machine's accelerator, or the CPU.

    Accelerators are those that PyTorch knows: CUDA, ROCm (also called cuda), Apple's MPS, Intel's XPU.

    Raises:
        DeviceError: the named device does not exist, or does not work here.
    """
    name = os.environ.get("PATCHFORGE_DEVICE") or "auto"
    if name != "auto":
        return named_device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def text_device(device: torch.device) -> torch.device:
    """Return the device of a text encoder: that of `PATCHFORGE_TEXT_DEVICE`, by default that of the image network.

    Raises:
        DeviceError: the named device does not exist, or does not work here.
    """
    name = os.environ.get("PATCHFORGE_TEXT_DEVICE") or "auto"
    return device if name == "auto" else named_device(name)


def named_device(name: str) -> torch.device:
    """Return a device by PyTorch's name for it, such as `cpu`, `cuda:1` or `mps`, after one sum on it.

    Raises:
        DeviceError: there is no such device, or it does not work here.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it. A CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@cache
def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bf16 matrix products are faster than float32: measured once on a CPU that has instructions for it.

    The instructions promise nothing: a Xeon with AVX-512 BF16, its AMX hidden by the virtual machine, computes bf16 at
    half the speed of float32, others at twice. A CPU without them only emulates bf16, several times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return device.type == "xpu"
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    return 1.2 * _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest of some times of one matrix product: a busy machine only makes them longer."""
    left, right = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def training_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for training: bf16 where it is fast, else float32."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bf16(device) else nullcontext()


def serving_dtype(device: torch.device, precision: str | None = None) -> torch.dtype:
    """Return the type of matrix products when serving: float32 or bfloat16.

    `precision` is one of `PRECISIONS`. None: that of `PATCHFORGE_PRECISION`.

    By default it is bf16 on CUDA and XPU, and float32 elsewhere. On a CPU it is float32 even where bf16 is faster: only
    in float32 is a picture bit for bit the same, alone or packed with others.

    Raises:
        DeviceError: it has another value.
    """
    name = precision or os.environ.get("PATCHFORGE_PRECISION") or "auto"
    if name not in PRECISIONS:
        raise DeviceError(f"PATCHFORGE_PRECISION is {name!r}; choose from {', '.join(PRECISIONS)}")
    if name == "auto":
        name = "bfloat16" if device.type in ("cuda", "xpu") and has_fast_bf16(device) else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def serving_autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for serving, with matrix products in `dtype`."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`. To CUDA, the copy uses pinned memory and does not block."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def compile_feed_forwards(network: nn.Module) -> None:
    """Compile the part of each block that works on single patches. The first evaluations then take much longer.

    Shapes are dynamic, because packs differ in their number of patches. Attention is not compiled: Python decides how
    patches form sequences, and the attention kernel is already fused.
    """
    for block in network.get_submodule("blocks").children():
        part = next(each for name, each in block.named_children() if name in ("mlp", "ff"))
        part.compile(dynamic=True)


def is_compiled(network: nn.Module) -> bool:
    """Whether some of it is, or will be at its first evaluation: which two threads must not see to at the same time."""
    return any(part._compiled_call_impl is not None for part in network.modules())


def prepare_cpu(threads: int | None, only_pictures: bool = False) -> None:
    """Set the number of threads (None: one per core that this process may use), and keep freed memory for reuse.

    The threads of `model.parallel` draw pictures. OpenMP's own threads do everything else, training above all. With
    `only_pictures` there is nothing else, and the threads that draw have OpenMP for themselves.
    """
    threads = threads or default_threads()
    torch.set_num_threads(1 if only_pictures else threads)
    use_threads(threads, pairs=threads // 2 if only_pictures else 0)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system.

    An evaluation allocates and frees hundreds of tensors of one or two megabytes, and each new page costs a page
    fault: 5 % of the time for a pack of 512 patches, and up to a fifth for one of 1,024.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)

"""Which device and precision to compute on, found once."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's ``mallopt``."""
KEPT_BYTES = 1 << 30
"""What may lie free at the end of the heap before it goes back to the system."""
LARGEST_KEPT = 32 << 20
"""The most that glibc takes as ``M_MMAP_THRESHOLD``."""


def best_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products beat float32: CUDA, and CPUs with AMX tiles or AVX-512 BF16.

    On a CPU that only emulates bf16 it is several times *slower* than float32, so never guess.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def training_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for training: bf16 where it is fast, else plain float32."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bf16(device) else nullcontext()


def serving_dtype(device: torch.device) -> torch.dtype:
    """What matrix products are computed in when serving: bf16 on CUDA; float32 on a CPU, where pictures repeat."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def serving_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for serving, in `serving_dtype`."""
    dtype = serving_dtype(device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """What lies on the CPU, on ``device``. To CUDA it goes by way of pinned memory, so that nobody waits for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def compile_feed_forwards(network: nn.Module) -> None:
    """Compile the part of each block that sees only packed patches; the first evaluations then take much longer.

    Shapes are dynamic: every pack has another number of patches. Attention stays as it is: how patches form sequences
    is Python's business, and its kernel is fused already.
    """
    for block in network.get_submodule("blocks").children():
        part = next(each for name, each in block.named_children() if name in ("mlp", "ff"))
        part.compile(dynamic=True)


def prepare_cpu(threads: int | None) -> None:
    """Compute with so many threads, None for every core this process may run on, and keep freed memory for reuse."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or cores or 1)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, instead of handing it back to the system.

    An evaluation makes and frees tensors of a megabyte or two by the hundred, and each new page costs a fault: 5 % of
    the time of a pack of 512 patches, and up to a fifth of one of 1,024.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)

"""Weights on disk: safetensors only, checked before use and written a tensor at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import BundleError

Shape = tuple[int, ...]

MAX_HEADER = 16 << 20
"""Bytes. The paper's largest network needs some 100 kB; a huge header is an attack on the reader's memory."""
KEEP_FLOAT32 = 4096
"""Tensors up to this many numbers (norms, biases, fixed frequencies) are never rounded: they cost nothing."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES_SHOWN = 5


def load_weights(
    path: Path, expected: Mapping[str, Shape] | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU, as ``dtype`` (None: as stored).

    ``expected`` gives the shape of every name that must be there, and no other may be. It is compared with the
    file's header before any tensor is read. A damaged file, a dtype other than float32, float16 or bfloat16,
    and weights that are not finite raise BundleError.
    """
    _check_header_length(path)
    weights: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes: dict[str, Shape] = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                entry = file.get_slice(name)
                shapes[name] = tuple(entry.get_shape())
                if entry.get_dtype() not in DTYPES:
                    raise BundleError(
                        f"{path}: {show(name)} is stored as {entry.get_dtype()}; allowed are {', '.join(DTYPES)}"
                    )
            if expected is not None:
                check_shapes(str(path), shapes, expected)
            for name in shapes:
                tensor = check_finite(str(path), name, file.get_tensor(name))
                weights[name] = tensor if dtype is None else tensor.to(dtype)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: not a readable safetensors file: {error}") from error
    return weights


def check_shapes(source: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise BundleError, listing names, unless ``found`` has exactly the names and shapes of ``expected``."""
    wrong = [
        f"{name} is {_by(found[name])}, not {_by(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("unexpected", [show(name) for name in found if name not in expected]),
        _listed("wrong shape", wrong),
    ]
    if any(problems):
        raise BundleError(f"{source}: the weights do not fit the network: {'; '.join(filter(None, problems))}")


def check_finite(source: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; BundleError if it holds a NaN or an infinity."""
    if not torch.isfinite(tensor).all():
        raise BundleError(f"{source}: {show(name)} holds NaN or infinite values")
    return tensor


def write_weights(path: Path, shapes: Mapping[str, Shape], read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file of ``read(name)`` for every name, holding one tensor in memory at a time.

    Tensors become ``dtype``, except that small ones stay float32. BundleError for another dtype, a value that is
    not finite once converted, and a tensor that has not the shape announced.
    """
    codes = {value: code for code, value in DTYPES.items()}
    if dtype not in codes:
        raise BundleError(f"{path.name}: cannot be written as {dtype}; allowed are {', '.join(DTYPES)}")
    stored = {name: torch.float32 if _count(shape) <= KEEP_FLOAT32 else dtype for name, shape in shapes.items()}
    # Wider types first keeps every tensor aligned, which readers may map straight into memory.
    order = sorted(shapes, key=lambda name: (-stored[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + _count(shapes[name]) * stored[name].itemsize
        header[name] = {"dtype": codes[stored[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            tensor = read(name).detach().to("cpu", stored[name])
            if tuple(tensor.shape) != tuple(shapes[name]):
                raise BundleError(f"{path.name}: {name} came as {_by(tuple(tensor.shape))}, not {_by(shapes[name])}")
            check_finite(path.name, name, tensor)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def show(text: object, limit: int = 120) -> str:
    """Words out of an untrusted file, fit for a message: printable and short."""
    shown = str(text)[: limit + 1]
    shown = shown if shown.isprintable() else ascii(shown)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def _check_header_length(path: Path) -> None:
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    if len(prefix) < 8:
        raise BundleError(f"{path}: truncated: {len(prefix)} bytes are no safetensors file")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER:
        raise BundleError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER:,} are allowed")
    if 8 + length > size:
        raise BundleError(f"{path}: truncated: the header alone has {length:,} bytes, the file {size:,}")


def _listed(what: str, names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return f"{what}: {', '.join(found[:NAMES_SHOWN])}{more}" if found else ""


def _by(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a single number"


def _count(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count

"""Weights on disk, as safetensors only. Reading checks everything; writing holds one tensor in memory.

The `safetensors` package writes only what is wholly in memory, so the writer here is our own.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchforge.model.errors import BundleError

Shape = tuple[int, ...]

MAX_HEADER = 16 << 20
"""Bytes. The paper's largest network needs about 100 kB. A huge header would exhaust the reader's memory."""
KEEP_FLOAT32 = 4096
"""Tensors of up to this many values (norms, biases, fixed frequencies) stay float32: they take little space."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES_SHOWN = 5


def load_weights(
    path: Path,
    expected: Mapping[str, Shape] | None = None,
    *,
    dtype: torch.dtype | None = None,
    names: Collection[str] | None = None,
    as_stored: Collection[str] = (),
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file to the CPU, as `dtype` (None: as stored).

    `expected` maps each name to its shape. The file must hold exactly these; its header is checked before any tensor
    is read. `names` are those to read, by default all; the others are ignored. Those `as_stored` keep their type.

    Raises:
        BundleError: the file is damaged or does not match `expected`, a dtype is not float32, float16 or bfloat16, or
            a weight is not finite.
    """
    _check_header_length(path)
    weights: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes: dict[str, Shape] = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if names is not None and name not in names:
                    continue
                entry = file.get_slice(name)
                shapes[name] = tuple(entry.get_shape())
                if (code := entry.get_dtype()) not in DTYPES:
                    allowed = ", ".join(DTYPES)
                    raise BundleError(f"{path}: {printable(name)} is stored as {code}; allowed types: {allowed}")
            if expected is not None:
                check_shapes(str(path), shapes, expected)
        for name, tensor in _read_tensors(path, shapes):
            check_finite(str(path), name, tensor)
            weights[name] = tensor if dtype is None or name in as_stored else tensor.to(dtype)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: not a readable safetensors file: {error}") from error
    return weights


def _read_tensors(path: Path, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors of a file whose header was checked, one after the other.

    `safetensors` would map the file: then each weight is in memory twice while a network takes it, and who replaces the
    file takes it from a running worker.
    """
    with path.open("rb", buffering=0) as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        for name, shape in sorted(shapes.items(), key=lambda item: header[item[0]]["data_offsets"]):
            tensor = torch.empty(shape, dtype=DTYPES[header[name]["dtype"]])
            room = tensor.reshape(-1).view(torch.uint8).numpy().data
            file.seek(8 + length + header[name]["data_offsets"][0])
            while room and (read := file.readinto(room)):
                room = room[read:]
            if room:
                raise BundleError(f"{path}: truncated at {printable(name)}")
            yield name, tensor


def read_shapes(path: Path) -> dict[str, Shape]:
    """Read the name and shape of every tensor of a safetensors file.

    Raises:
        BundleError: the file is damaged.
    """
    _check_header_length(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: not a readable safetensors file: {error}") from error


def check_shapes(source: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Check that `found` has exactly the names and shapes of `expected`.

    Raises:
        BundleError: they differ; the message lists names.
    """
    wrong = [
        f"{name} is {_format_shape(found[name])}, not {_format_shape(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        _list_names("missing", [name for name in expected if name not in found]),
        _list_names("unexpected", [printable(name) for name in found if name not in expected]),
        _list_names("wrong shape", wrong),
    ]
    if any(problems):
        raise BundleError(f"{source}: the weights do not fit the network: {'; '.join(filter(None, problems))}")


def check_finite(source: str, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor itself.

    Raises:
        BundleError: it holds a NaN or an infinity.
    """
    if not torch.isfinite(tensor).all():
        raise BundleError(f"{source}: {printable(name)} holds NaN or infinite values")
    return tensor


def write_weights(path: Path, shapes: Mapping[str, Shape], read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file of `read(name)` for every name in `shapes`, with one tensor in memory at a time.

    Tensors become `dtype`; small ones stay float32.

    Raises:
        BundleError: `dtype` is not allowed, a converted value is not finite, or a tensor does not have its shape in
            `shapes`.
    """
    codes = {value: code for code, value in DTYPES.items()}
    if dtype not in codes:
        raise BundleError(f"{path.name}: cannot be written as {dtype}; allowed types: {', '.join(DTYPES)}")
    stored = {name: torch.float32 if prod(shape) <= KEEP_FLOAT32 else dtype for name, shape in shapes.items()}
    # Wider types first: then every tensor is aligned, and readers can map the file into memory.
    order = sorted(shapes, key=lambda name: (-stored[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + prod(shapes[name]) * stored[name].itemsize
        header[name] = {"dtype": codes[stored[name]], "shape": list(shapes[name]), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            tensor = read(name).detach().to("cpu", stored[name])
            if tuple(tensor.shape) != tuple(shapes[name]):
                found, expected = _format_shape(tuple(tensor.shape)), _format_shape(shapes[name])
                raise BundleError(f"{path.name}: {name} is {found}, not {expected}")
            check_finite(path.name, name, tensor)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def printable(text: object, limit: int = 120) -> str:
    """Make text from an untrusted file fit for a message: printable, and at most `limit` characters long."""
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
        raise BundleError(f"{path}: truncated: {len(prefix)} bytes cannot be a safetensors file")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER:
        raise BundleError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER:,} are allowed")
    if 8 + length > size:
        raise BundleError(f"{path}: truncated: the header alone has {length:,} bytes, the file has {size:,}")


def _list_names(what: str, names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return f"{what}: {', '.join(found[:NAMES_SHOWN])}{more}" if found else ""


def _format_shape(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "a single number"

"""Read and write the pictures of an `.npz`, as the ADM evaluation suite does, some at a time. Free of torch."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from glob import escape
from pathlib import Path

import numpy as np

from patchforge.model.errors import DataError

ARRAY = "arr_0.npy"
MAX_SIDE = 4096


def read_npz(path: Path, portion: int) -> Iterator[np.ndarray]:
    """Yield pictures `(n, height, width, 3)` uint8, `portion` at a time, from the array `arr_0`.

    Raises:
        DataError: the file is damaged, or has no such array of pictures.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(ARRAY) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(file)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or by_column or max(shape[1:3]) > MAX_SIDE:
                raise DataError(f"{path}: arr_0 is {dtype} {shape}, not pictures (N, height, width, 3) of uint8")
            count, size = shape[0], int(np.prod(shape[1:]))
            for start in range(0, count, portion):
                some = min(portion, count - start)
                data = file.read(some * size)
                if len(data) != some * size:
                    raise DataError(f"{path}: truncated")
                yield np.frombuffer(bytearray(data), np.uint8).reshape(some, *shape[1:])
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise DataError(f"{path}: not an .npz with the array arr_0: {error}") from error


def write_npz(path: Path, count: int, portions: Iterable[np.ndarray]) -> None:
    """Write `count` pictures as `arr_0` `(count, height, width, 3)` uint8, with one portion in memory at a time.

    The file is there once it is whole. `portions` are `(n, height, width, 3)` uint8.

    Raises:
        DataError: the portions are of different sizes, or have another number of pictures.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{escape(path.name)}.*.part"):  # of a run that was killed: it may have gigabytes
        left.unlink(missing_ok=True)
    shape: tuple[int, ...] | None = None
    written = 0
    try:
        with (
            zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            archive.open(ARRAY, "w", force_zip64=True) as file,
        ):
            for portion in portions:
                if shape is None:
                    shape = portion.shape[1:]
                    described = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(file, described)
                if portion.shape[1:] != shape or portion.dtype != np.uint8:
                    raise DataError(f"{path}: pictures of {portion.shape[1:]} {portion.dtype} after some of {shape}")
                file.write(np.ascontiguousarray(portion).data)
                written += len(portion)
        if written != count:
            raise DataError(f"{path}: {written} pictures instead of {count}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

"""Read the pictures of an `.npz`, as the ADM evaluation suite writes them, some at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
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
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise DataError(f"{path}: not an .npz with the array arr_0: {error}") from error

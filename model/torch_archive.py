"""A torch.save file opened as the zip archive it is, one storage in memory at a time."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from model.errors import BundleError
from model.safe_pickle import StorageRef, TensorRef, read_pickle
from model.weights import show

MAX_PICKLE = 4 << 20
"""Bytes of data.pkl, which holds names, shapes and settings; 400 tensors take some 60 kB."""
MAX_DIRECTORY = 4 << 20
"""Bytes of the zip directory, read at one go; 400 tensors take some 40 kB."""
CHUNK = 1 << 20
ZIP_MAGIC = b"PK\x03\x04"
ENCRYPTED = 0x1
ENTRY = re.compile(
    r"data\.pkl|data/\d{1,9}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id"
)
DAMAGE = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    RuntimeError,
    NotImplementedError,
    struct.error,
)


class TorchArchive:
    """Reads the pickled tree and the tensors of a ``.ckpt``; use it in a ``with`` statement.

    Opening raises BundleError for anything but a plain, uncompressed torch.save archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[str, bytearray] | None = None
        try:
            self._file = _BoundedFile(path)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self._size = path.stat().st_size
            _check_start(path, self._file.read(64))
            self._zip = zipfile.ZipFile(self._file)
            self._entries = self._check_entries(self._zip.infolist())
            self._check_byte_order()
        except DAMAGE as error:
            self._file.close()
            raise BundleError(f"{path}: damaged zip archive: {show(error)}") from error
        except BundleError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()
        self._file.close()

    def read_tree(self) -> object:
        """What was saved, as inert data (see `read_pickle`)."""
        return read_pickle(bytes(self._read("data.pkl", MAX_PICKLE)), str(self.path))

    def read_tensor(self, tensor: TensorRef) -> Tensor:
        """The tensor's values, on the CPU, in the dtype they are stored in."""
        storage = tensor.storage
        if not storage.count or 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=storage.dtype)
        flat = torch.frombuffer(self._read_storage(storage), dtype=storage.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)

    def check_storages(self, tensors: Mapping[str, TensorRef]) -> None:
        """BundleError unless every storage is there in the size announced and no two tensors overlap in bulk."""
        storages: dict[str, StorageRef] = {}
        needed = 0
        for name, tensor in tensors.items():
            storage = storages.setdefault(tensor.storage.key, tensor.storage)
            entry = self._entries.get(f"data/{storage.key}")
            size = tensor.storage.count * tensor.storage.dtype.itemsize
            if entry is None or entry.file_size != size:
                has = "missing" if entry is None else f"{entry.file_size:,} bytes"
                raise BundleError(f"{self.path}: the data of {show(name)} is {has}, not {size:,} bytes")
            needed += torch.Size(tensor.shape).numel() * tensor.storage.dtype.itemsize
        if needed > self._size:
            raise BundleError(f"{self.path}: refused: its tensors would unfold to more than the file's own size")

    def _read_storage(self, storage: StorageRef) -> bytearray:
        # Tensors that share a storage mostly follow each other, so keeping the last one is enough.
        if self._last is None or self._last[0] != storage.key:
            self._last = None
            self._last = storage.key, self._read(f"data/{storage.key}", self._size)
        return self._last[1]

    def _read(self, name: str, limit: int) -> bytearray:
        """An entry's bytes, its checksum verified."""
        entry = self._entries.get(name)
        if entry is None or entry.file_size > limit:
            problem = "is missing" if entry is None else f"has {entry.file_size:,} bytes, more than {limit:,}"
            raise BundleError(f"{self.path}: the entry {show(name)} {problem}")
        content = bytearray()
        try:
            with self._zip.open(entry) as file:
                while chunk := file.read(CHUNK):
                    content += chunk
        except DAMAGE as error:
            raise BundleError(f"{self.path}: damaged zip archive, at {show(name)}: {show(error)}") from error
        if len(content) != entry.file_size:
            raise BundleError(f"{self.path}: truncated at the entry {show(name)}")
        return content

    def _check_entries(self, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        """The entries by name inside the archive's one folder."""
        roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise BundleError(f"{self.path}: a torch.save archive has one data.pkl; this one has {len(roots)}")
        found: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.removeprefix(roots[0])
            if not entry.filename.startswith(roots[0]) or not ENTRY.fullmatch(name):
                raise BundleError(
                    f"{self.path}: refused: holds {show(entry.filename)}, which is no part of saved weights"
                    " (TorchScript and other programs are not read)"
                )
            if name in found:
                raise BundleError(f"{self.path}: refused: holds {show(entry.filename)} twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise BundleError(f"{self.path}: refused: {show(name)} is compressed, as torch.save never does")
            if entry.flag_bits & ENCRYPTED:
                raise BundleError(f"{self.path}: refused: {show(name)} is encrypted")
            found[name] = entry
        if sum(entry.file_size for entry in entries) > self._size:
            raise BundleError(f"{self.path}: refused: its entries claim more bytes than the file has")
        return found

    def _check_byte_order(self) -> None:
        if "byteorder" in self._entries and self._read("byteorder", 16) != b"little":
            raise BundleError(f"{self.path}: refused: saved on a big-endian machine")


class _BoundedFile(io.FileIO):
    """A file that gives no more than MAX_DIRECTORY bytes at once, the most a zip directory may have."""

    def read(self, size: int | None = -1, /) -> bytes:
        """``size`` bytes, or all that are left; BundleError if that is more than may be asked."""
        wanted = MAX_DIRECTORY + 1 if size is None or size < 0 else size
        data = (super().read(wanted) or b"") if wanted <= MAX_DIRECTORY + 1 else None
        if data is None or len(data) > MAX_DIRECTORY:
            raise BundleError(f"{self.name!s}: refused: a zip directory of more than {MAX_DIRECTORY:,} bytes")
        return data


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(ZIP_MAGIC):
        return
    if start.startswith(b"\x80"):
        raise BundleError(
            f"{path}: refused: a bare pickle, the legacy format of torch before 1.6. Whoever trusts it can load it"
            " and torch.save it again with torch 1.6 or later"
        )
    if not start:
        raise BundleError(f"{path}: truncated: the file is empty")
    raise BundleError(f"{path}: is no torch.save file: it does not start as a zip archive")

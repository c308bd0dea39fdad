"""Read a torch.save file as a zip archive, with one storage in memory at a time."""

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

from patchforge.model.errors import BundleError
from patchforge.model.storage.safe_pickle import StorageRef, TensorRef, read_pickle
from patchforge.model.storage.weights import printable

MAX_PICKLE = 4 << 20
"""Bytes of data.pkl, which holds names, shapes and settings. 400 tensors need about 60 kB."""
MAX_DIRECTORY = 4 << 20
"""Bytes of the zip directory, which Python reads all at once. 400 tensors need about 40 kB."""
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
    """Reads the pickled tree and the tensors of a `.ckpt`. Use it in a `with` statement.

    Raises:
        BundleError: from every method, if the file is not a plain, uncompressed torch.save archive, or is damaged.
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
            raise BundleError(f"{path}: damaged zip archive: {printable(error)}") from error
        except BundleError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()
        self._file.close()

    def read_tree(self) -> object:
        """Read the saved object as plain data (see `read_pickle`)."""
        return read_pickle(bytes(self._read("data.pkl", MAX_PICKLE)), str(self.path))

    def read_tensor(self, tensor: TensorRef) -> Tensor:
        """Read a tensor to the CPU, in its stored dtype."""
        storage = tensor.storage
        if not storage.count or 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=storage.dtype)
        flat = torch.frombuffer(self._read_storage(storage), dtype=storage.dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)

    def check_storages(self, tensors: Mapping[str, TensorRef]) -> None:
        """Check that every storage has its claimed size, and that all tensors together are no larger than the file."""
        storages: dict[str, StorageRef] = {}
        needed = 0
        for name, tensor in tensors.items():
            storage = storages.setdefault(tensor.storage.key, tensor.storage)
            entry = self._entries.get(f"data/{storage.key}")
            size = tensor.storage.count * tensor.storage.dtype.itemsize
            if entry is None or entry.file_size != size:
                has = "missing" if entry is None else f"{entry.file_size:,} bytes"
                raise BundleError(f"{self.path}: the data of {printable(name)} is {has}; expected {size:,} bytes")
            needed += torch.Size(tensor.shape).numel() * tensor.storage.dtype.itemsize
        if needed > self._size:
            raise BundleError(f"{self.path}: refused: its tensors would take more memory than the file's size")

    def _read_storage(self, storage: StorageRef) -> bytearray:
        # Tensors that share a storage usually come one after the other, so we keep only the last storage.
        if self._last is None or self._last[0] != storage.key:
            self._last = None
            self._last = storage.key, self._read(f"data/{storage.key}", self._size)
        return self._last[1]

    def _read(self, name: str, limit: int) -> bytearray:
        """Read an entry and verify its checksum."""
        entry = self._entries.get(name)
        if entry is None or entry.file_size > limit:
            problem = "is missing" if entry is None else f"has {entry.file_size:,} bytes, more than {limit:,}"
            raise BundleError(f"{self.path}: the entry {printable(name)} {problem}")
        content = bytearray()
        try:
            with self._zip.open(entry) as file:
                while chunk := file.read(CHUNK):
                    content += chunk
        except DAMAGE as error:
            raise BundleError(f"{self.path}: damaged zip archive, at {printable(name)}: {printable(error)}") from error
        if len(content) != entry.file_size:
            raise BundleError(f"{self.path}: truncated at the entry {printable(name)}")
        return content

    def _check_entries(self, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        """Return the entries by their names inside the archive's only folder."""
        roots = [entry.filename.removesuffix("data.pkl") for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(roots) != 1:
            raise BundleError(f"{self.path}: a torch.save archive has one data.pkl; this one has {len(roots)}")
        found: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.removeprefix(roots[0])
            if not entry.filename.startswith(roots[0]) or not ENTRY.fullmatch(name):
                raise BundleError(
                    f"{self.path}: refused: {printable(entry.filename)} is not part of saved weights"
                    " (TorchScript and other programs are not read)"
                )
            if name in found:
                raise BundleError(f"{self.path}: refused: {printable(entry.filename)} occurs twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise BundleError(f"{self.path}: refused: {printable(name)} is compressed; torch.save never compresses")
            if entry.flag_bits & ENCRYPTED:
                raise BundleError(f"{self.path}: refused: {printable(name)} is encrypted")
            found[name] = entry
        if sum(entry.file_size for entry in entries) > self._size:
            raise BundleError(f"{self.path}: refused: its entries claim more bytes than the file has")
        return found

    def _check_byte_order(self) -> None:
        if "byteorder" in self._entries and self._read("byteorder", 16) != b"little":
            raise BundleError(f"{self.path}: refused: saved on a big-endian machine")


class _BoundedFile(io.FileIO):
    """A file that never returns more than MAX_DIRECTORY bytes at once, the limit for a zip directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, or the rest of the file. Raise BundleError above the limit."""
        wanted = MAX_DIRECTORY + 1 if size is None or size < 0 else size
        data = (super().read(wanted) or b"") if wanted <= MAX_DIRECTORY + 1 else None
        if data is None or len(data) > MAX_DIRECTORY:
            raise BundleError(f"{self.name!s}: refused: its zip directory has more than {MAX_DIRECTORY:,} bytes")
        return data


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(ZIP_MAGIC):
        return
    if start.startswith(b"\x80"):
        raise BundleError(
            f"{path}: refused: a bare pickle, the legacy format of torch before 1.6. If you trust it, load it"
            " and save it again with torch 1.6 or later"
        )
    if not start:
        raise BundleError(f"{path}: truncated: the file is empty")
    raise BundleError(f"{path}: not a torch.save file: it does not start like a zip archive")

"""Tensors of the Open Inference Protocol: their types, and their bytes, without an array library."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidRequest

CODES = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""Each datatype of numbers, and what ``struct`` calls it."""
BYTES = "BYTES"
LENGTH = struct.Struct("<I")
MAX_ELEMENTS = 64  # of an input; ours have one


@dataclass(frozen=True)
class Given:
    """An input as sent: its elements in row-major order, of BYTES as bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[Any, ...]

    @property
    def only(self) -> Any:
        """The element of a tensor that has one."""
        if len(self.elements) != 1 or any(size != 1 for size in self.shape):
            raise InvalidRequest("must have exactly one element", field=self.name)
        return self.elements[0]


@dataclass(frozen=True)
class Made:
    """An output: its bytes, little-endian and row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def elements(self) -> list[Any]:
        """As numbers."""
        return list(struct.unpack(f"<{len(self.raw) // struct.calcsize(CODES[self.datatype])}{self._code}", self.raw))

    @property
    def _code(self) -> str:
        return CODES[self.datatype]


def made(name: str, datatype: str, shape: tuple[int, ...], numbers: Sequence[float]) -> Made:
    """An output of these numbers."""
    return Made(name, datatype, shape, struct.pack(f"<{len(numbers)}{CODES[datatype]}", *numbers))


def from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: bytes) -> Given:
    """Raises :class:`InvalidRequest`, naming the input, if the bytes are not what its type and shape say."""
    if datatype == BYTES:
        elements = tuple(_texts(name, raw))
    elif datatype in CODES:
        size = struct.calcsize(f"<{CODES[datatype]}")
        if len(raw) % size or len(raw) > size * MAX_ELEMENTS:
            raise InvalidRequest(f"has {len(raw)} bytes, which its shape does not need", field=name)
        elements = struct.unpack(f"<{len(raw) // size}{CODES[datatype]}", raw)
    else:
        raise InvalidRequest("has no datatype that is known here", field=name)
    return Given(name, datatype, shape, elements)


def from_list(name: str, datatype: str, shape: tuple[int, ...], data: Sequence[Any]) -> Given:
    """The same of numbers and texts, nested or not."""
    if datatype != BYTES and datatype not in CODES:
        raise InvalidRequest("has no datatype that is known here", field=name)
    elements = list(_flat(name, data))
    if datatype == BYTES:
        elements = [each.encode("utf-8", "surrogatepass") if isinstance(each, str) else each for each in elements]
    return Given(name, datatype, shape, tuple(elements))


def _texts(name: str, raw: bytes) -> Iterator[bytes]:
    at = count = 0
    while at < len(raw):
        count += 1
        if count > MAX_ELEMENTS:
            raise InvalidRequest("has too many elements", field=name)
        end = at + LENGTH.size
        if end > len(raw):
            raise InvalidRequest("ends within the length of an element", field=name)
        at, end = end, end + LENGTH.unpack_from(raw, at)[0]
        if end > len(raw):
            raise InvalidRequest("ends within an element", field=name)
        yield raw[at:end]
        at = end


def _flat(name: str, data: Sequence[Any]) -> Iterator[Any]:
    stack, count = [iter(data)], 0
    while stack:
        for each in stack[-1]:
            if isinstance(each, list):
                stack.append(iter(each))
                break
            count += 1
            if count > MAX_ELEMENTS:
                raise InvalidRequest("has too many elements", field=name)
            yield each
        else:
            stack.pop()

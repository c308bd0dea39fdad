"""Tensors of the Open Inference Protocol: datatypes, and packing and unpacking, without an array library."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from patchforge.service.errors import InvalidRequest

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
"""The format character of `struct` for each numeric datatype."""
BYTES = "BYTES"
LENGTH = struct.Struct("<I")
MAX_ELEMENTS = 64  # unpacked per input; a valid input has one


@dataclass(frozen=True)
class Input:
    """An input as sent. Its elements are in row-major order; those of datatype BYTES are bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[Any, ...]

    @property
    def only(self) -> Any:
        """The single element.

        Raises:
            InvalidRequest: the tensor has none, or several.
        """
        if len(self.elements) != 1 or any(size != 1 for size in self.shape):
            raise InvalidRequest("must have exactly one element", field=self.name)
        return self.elements[0]


@dataclass(frozen=True)
class Output:
    """An output. `raw` holds its elements, little-endian and row-major."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes

    @property
    def elements(self) -> list[Any]:
        """The elements as numbers."""
        return [number for (number,) in struct.iter_unpack(f"<{CODES[self.datatype]}", self.raw)]


def pack_output(name: str, datatype: str, shape: tuple[int, ...], numbers: Sequence[float]) -> Output:
    """Makes an output from its elements."""
    return Output(name, datatype, shape, struct.pack(f"<{len(numbers)}{CODES[datatype]}", *numbers))


def input_from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: bytes) -> Input:
    """Unpacks an input from its bytes.

    Raises:
        InvalidRequest: the bytes do not fit the datatype; `field` is the input's name.
    """
    if datatype == BYTES:
        elements = tuple(_unpack_bytes_elements(name, raw))
    elif datatype in CODES:
        size = struct.calcsize(f"<{CODES[datatype]}")
        if len(raw) % size or len(raw) > size * MAX_ELEMENTS:
            raise InvalidRequest(f"has {len(raw)} bytes: one element of {datatype} has {size}", field=name)
        elements = struct.unpack(f"<{len(raw) // size}{CODES[datatype]}", raw)
    else:
        raise InvalidRequest("has an unknown datatype", field=name)
    return Input(name, datatype, shape, elements)


def input_from_list(name: str, datatype: str, shape: tuple[int, ...], data: Sequence[Any]) -> Input:
    """Makes an input from numbers or strings, nested or flat.

    Raises:
        InvalidRequest: the datatype is unknown, or there are too many elements; `field` is the input's name.
    """
    if datatype != BYTES and datatype not in CODES:
        raise InvalidRequest("has an unknown datatype", field=name)
    elements = list(_flatten(name, data))
    if datatype == BYTES:
        elements = [each.encode("utf-8", "surrogatepass") if isinstance(each, str) else each for each in elements]
    return Input(name, datatype, shape, tuple(elements))


def _unpack_bytes_elements(name: str, raw: bytes) -> Iterator[bytes]:
    """Yields the elements of a BYTES tensor: each follows its length in four bytes."""
    at = count = 0
    while at < len(raw):
        count += 1
        if count > MAX_ELEMENTS:
            raise InvalidRequest("has too many elements", field=name)
        end = at + LENGTH.size
        if end > len(raw):
            raise InvalidRequest("is cut off inside the length of an element", field=name)
        at, end = end, end + LENGTH.unpack_from(raw, at)[0]
        if end > len(raw):
            raise InvalidRequest("is cut off inside an element", field=name)
        yield raw[at:end]
        at = end


def _flatten(name: str, data: Sequence[Any]) -> Iterator[Any]:
    """Yields the elements of nested lists. A stack, because a caller may nest deeper than Python can recurse."""
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

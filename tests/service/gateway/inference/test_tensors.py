"""Tensors from bytes and lists, valid and not."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.inference.tensors import CODES, input_from_list, input_from_raw, pack_output


@pytest.mark.parametrize("datatype", CODES)
def test_numbers_of_every_type_survive_the_way_there_and_back(datatype: str) -> None:
    sent = pack_output("x", datatype, (2,), [1, 0])
    assert sent.elements == [1, 0]
    assert input_from_raw("x", datatype, (2,), sent.raw).elements == (1, 0)
    assert input_from_list("x", datatype, (2, 1), [[1], [0]]).elements == (1, 0)


def test_texts_follow_their_lengths() -> None:
    raw = struct.pack("<I", 3) + b"cat" + struct.pack("<I", 0) + struct.pack("<I", 2) + "é".encode()
    assert input_from_raw("x", "BYTES", (3,), raw).elements == (b"cat", b"", "é".encode())
    assert input_from_list("x", "BYTES", (2,), ["é", b"\xff"]).elements == ("é".encode(), b"\xff")


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [
        ("INT32", b"\0\0\0"),
        ("INT32", bytes(4 * 65)),
        ("BYTES", b"\1\0\0"),
        ("BYTES", b"\2\0\0\0x"),
        ("BYTES", b"\xff\xff\xff\xffx"),
        ("BF16", b"\0\0"),
        ("", b""),
    ],
)
def test_bytes_that_do_not_fit_their_type(datatype: str, raw: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        input_from_raw("x", datatype, (1,), raw)
    assert caught.value.field == "x"


@pytest.mark.parametrize("data", [[0] * 65, [[0] * 40, [[0]] * 40]])
def test_lists_that_are_too_long(data: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="too many"):
        input_from_list("x", "INT32", (1,), data)


def test_deep_nesting_costs_no_recursion() -> None:
    data: list[Any] = [7]
    for _ in range(100_000):
        data = [data]
    assert input_from_list("x", "INT32", (1,), data).only == 7
    while isinstance(data[0], list):  # otherwise the interpreter recurses to free it
        data = data[0]


@pytest.mark.parametrize(("shape", "data"), [((2,), [1, 2]), ((1,), []), ((2,), [1]), ((0,), [1])])
def test_a_tensor_that_should_have_one_element(shape: tuple[int, ...], data: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="exactly one"):
        _ = input_from_list("x", "INT32", shape, data).only
    assert input_from_list("x", "INT32", (), [1]).only == input_from_list("x", "INT32", (1, 1), [[1]]).only == 1

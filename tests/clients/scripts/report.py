"""What every script of a client's environment uses: it runs checks one by one and prints how each went, as JSON."""

from __future__ import annotations

import json
import struct
import sys
import traceback
import zlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def packages(*names: str) -> None:
    """Print the versions of the packages that are tried."""
    print(json.dumps({"versions": {name: version(name) for name in names}}), flush=True)


def check(what: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Run a function at once, and print whether it raised."""

    def run(tried: Callable[[], object]) -> Callable[[], object]:
        try:
            tried()
            print(json.dumps({"check": what, "works": True}), flush=True)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            print(json.dumps({"check": what, "works": False, "why": f"{type(error).__name__}: {error}"}), flush=True)
        return tried

    return run


def refused(kind: type[Exception], call: Callable[[], object]) -> Any:
    """The error of this kind that a call raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("it was not refused")


def png(width: int, height: int, alpha: bool = False) -> bytes:
    """A picture, made without an imaging library: blue, or with `alpha` black and transparent on its left half."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    left, right = (b"\0\0\0\0", b"\0\0\0\xff") if alpha else (b"\0\0\xff", b"\0\0\xff")
    row = b"\0" + left * (width // 2) + right * (width - width // 2)
    header = struct.pack(">IIBBBBB", width, height, 8, 6 if alpha else 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * height))
        + chunk(b"IEND", b"")
    )


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n")

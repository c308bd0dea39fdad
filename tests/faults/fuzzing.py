"""Odd input for fuzzing: a few fixed cases in `make test`, many random ones in `make test-faults`."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW, MANY = 100, 1500
amounts = pytest.mark.parametrize(
    "cases",
    [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)


def fuzz(cases: int) -> settings:
    """Settings for `cases` cases. None of them has to be fast, because the machine may be busy."""
    return settings(
        max_examples=cases,
        derandomize=cases == FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def little_memory(mebibytes: float) -> Iterator[None]:
    """Fails if the process needs this much more memory inside the block. For one case only: hypothesis itself grows."""
    with suppress(OSError):
        _RESET_PEAK.write_text("5")  # Linux only; elsewhere the limit is above the peak of all earlier cases
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / _PER_MEBIBYTE
    assert grown < mebibytes, f"took {grown:.0f} MiB more"


_RESET_PEAK = Path("/proc/self/clear_refs")
_PER_MEBIBYTE = 2**20 if sys.platform == "darwin" else 2**10

_TELLTALE = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
_TELLTALE |= {"socket.connect", "ctypes.dlopen"}
_heard: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is not None and event in _TELLTALE:
        _heard.append(f"{event} {arguments!r:.200}")


@contextmanager
def no_code_run() -> Iterator[None]:
    """Fails if Python starts a program, opens a connection or unpickles anything. All of these raise audit events."""
    global _heard
    if not _hooked:
        sys.addaudithook(_hear)  # hooks cannot be removed, so this one is switched off after the block
        _hooked.append(True)
    _heard = []
    try:
        yield
        assert not _heard, _heard
    finally:
        _heard = None


_hooked: list[bool] = []

ODD_TEXT = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(codec=None, categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Co"]), max_size=10),
    st.sampled_from(["", "\0", "\ud800", "\r\n", "\u2028", "\x85", "../", "NaN", "1e999", "true", "null", "x" * 3000]),
)
ODD_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 1e308, 5e-324, -0.0]),
)
SCALARS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_TEXT, inner, max_size=4),
    max_leaves=8,
)


def as_json(value: Any) -> bytes:
    """JSON as strangers send it: with NaN, and with lone surrogates escaped."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Returns the bytes with random damage: cut, changed, inserted, removed or repeated parts."""
    broken = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(broken) - 1)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["cut", "change", "insert", "remove", "repeat", "extreme"])):
            case "cut":
                del broken[at:]
            case "change":
                broken[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                broken[at:at] = draw(st.binary(max_size=length))
            case "remove":
                del broken[at : at + length]
            case "repeat":
                broken[at:at] = broken[at : at + length] * draw(st.integers(1, 50))
            case "extreme":
                broken[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7]))
    return bytes(broken)

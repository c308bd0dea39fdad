"""Splits work on a CPU between Python threads, each of which computes with one OpenMP thread.

OpenMP's threads would wait for each other after every operation, some hundred times per evaluation. These threads wait
once. That is faster for large work, stays fast when other processes take a core for a while, and its results do not
depend on the number of threads. In small work, threads mostly wait for the Python interpreter. So small work is done by
two OpenMP threads, if each has a free core, and if both together compute the same as one, bit for bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from patchforge.model.openmp import free_cores, usable_cores

T = TypeVar("T")


def _do_nothing() -> None:
    """What `abandon` does if no call waits for another."""


class Crew(Protocol):
    """Computes the parts of some work."""

    @property
    def parts(self) -> int:
        """The most parts to split work into."""

    def run(
        self, calls: Sequence[Callable[[], T]], abandon: Callable[[], None] = _do_nothing, kind: Hashable = None
    ) -> list[T]:
        """Run the calls, at most `parts` of them, and return their results in order when all have ended.

        If a call fails, its exception is raised here. First `abandon` is called, which must wake all calls that wait
        for the failed one. Modes of PyTorch, such as inference mode, belong to one thread: a call must enter its own.
        If `kind` is given, the calls return tensors, and all calls of that kind use tensors of the same shapes. They
        may then run on two OpenMP threads each, if these were found to compute the same as one, bit for bit.
        """


class Caller:
    """The calling thread itself."""

    parts = 1

    def run(
        self, calls: Sequence[Callable[[], T]], abandon: Callable[[], None] = _do_nothing, kind: Hashable = None
    ) -> list[T]:
        """Run one call after the other."""
        return [call() for call in calls]


class Team:
    """Threads that compute one part each, at the same time. Other callers wait until they have finished."""

    def __init__(self, threads: int, pairs: int = 0) -> None:
        """Start `threads` threads, and for small work `pairs` threads with two OpenMP threads each.

        Use `pairs` only if no other thread of this process uses several OpenMP threads. With more OpenMP threads than
        cores, they do not spin at all, and two take longer than one.
        """
        before = torch.get_num_threads()
        self.parts = threads
        self._singles = [ThreadPoolExecutor(1, f"compute-{number}") for number in range(threads)]
        self._pairs = [ThreadPoolExecutor(1, f"pair-{number}") for number in range(pairs)]
        self._turn = threading.Lock()
        self._alike: dict[Hashable, bool] = {}
        """Kind of calls → whether two OpenMP threads compute the same as one."""
        wait([member.submit(_set_up_member, 1) for member in self._singles])
        wait([member.submit(_set_up_member, 2) for member in self._pairs])
        torch.set_num_threads(before)  # otherwise all later threads would start with the members' number

    def run(
        self, calls: Sequence[Callable[[], T]], abandon: Callable[[], None] = _do_nothing, kind: Hashable = None
    ) -> list[T]:
        """See `Crew`. An interrupted caller also waits until the calls have ended."""
        two = kind is not None and len(calls) <= len(self._pairs) and free_cores() >= 2 * len(calls)
        with self._turn:
            if not two or not self._alike.get(kind, True):
                return _run_all(self._singles, calls, abandon)
            made = _run_all(self._pairs, calls, abandon)
            if kind not in self._alike:
                one = _run_all(self._singles, calls, abandon)
                self._alike[kind] = all(map(torch.equal, cast(list[Tensor], made), cast(list[Tensor], one)))
                return one
            return made


class _Here(threading.local):
    caller = False


_here = _Here()
CALLER = Caller()
_making = threading.Lock()
_team: Team | None = None


def crew(device: torch.device) -> Crew:
    """Return who computes on `device`: the team on a CPU; otherwise, and in the team's own threads, the caller."""
    global _team
    if device.type != "cpu" or _here.caller:
        return CALLER
    with _making:
        if _team is None:
            _team = Team(default_threads())
        return _team


def use_threads(threads: int, pairs: int = 0) -> None:
    """Compute with a team of `threads` threads and `pairs` pairs; see `Team`."""
    global _team
    with _making:
        _team = Team(threads, pairs)


@cache
def default_threads() -> int:
    """Return the number of usable cores, or PyTorch's own number of threads (from OMP_NUM_THREADS) if it is lower."""
    return min(usable_cores(), torch.get_num_threads())


@contextmanager
def here() -> Iterator[None]:
    """Compute in the calling thread inside this block. Some modes and counters see only their own thread."""
    before, _here.caller = _here.caller, True
    try:
        yield
    finally:
        _here.caller = before


def _set_up_member(openmp: int) -> None:
    _here.caller = True
    torch.get_num_threads()  # the first call in a thread sets its number; later, it would undo the next line
    torch.set_num_threads(openmp)


def _run_all(
    members: Sequence[ThreadPoolExecutor], calls: Sequence[Callable[[], T]], abandon: Callable[[], None]
) -> list[T]:
    """Run each call on another member, and return the results in order."""
    futures: list[Future[T]] = []
    try:
        for member, call in zip(members, calls, strict=False):
            futures.append(member.submit(_run_guarded, call, abandon))
        wait(futures)
    except BaseException:
        abandon()
        raise
    finally:
        wait(futures)
    failed = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failed, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def _run_guarded(call: Callable[[], T], abandon: Callable[[], None]) -> T:
    try:
        return call()
    except BaseException:
        abandon()
        raise


def _drop_team() -> None:
    """Drop the team in a forked process: its threads do not exist there."""
    global _team
    _team = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_team)

"""One evaluation on a CPU, by one thread, by OpenMP's threads, and in parts; on a quiet machine and beside other work.

Each way runs in its own process, because OpenMP reads its settings once. The ways take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from patchforge.model.openmp import DEFAULT_SPINS, SPINS

ONE, OPENMP, PARTS = WAYS = "one thread", "OpenMP", "parts"
GUIDED = 1, 2, 4, 8
UNGUIDED = 0
"""Stands for one picture without guidance."""
REPEATS = 4
"""Evaluations per turn. The first is not counted: the others' turns left this process's memory cold."""


@dataclass(frozen=True)
class ThreadsRow:
    """One pack, evaluated in one way."""

    pack: str
    way: str
    quiet: float
    """Median milliseconds."""
    busy: float
    """The same beside busy processes."""


def bench_threads(bundle: Path, threads: int, rounds: int, busy: int = 1) -> Iterator[ThreadsRow]:
    """Time every pack in every way, first on a quiet machine, then beside `busy` processes.

    Raises:
        EOFError: the bundle cannot be loaded; the child processes print why.
    """
    with ExitStack() as stack:
        children = {way: stack.enter_context(_child(bundle, threads, way)) for way in WAYS}
        for child in children.values():
            child.recv()  # waits until the child is ready
        packs = {UNGUIDED: "1, unguided"} | {count: f"{count}, guided" for count in GUIDED}
        measured: dict[tuple[int, str, int], list[float]] = {}
        for others in (0, busy):
            with _busy(others):
                for _ in range(rounds):
                    for pack in packs:
                        for way, child in children.items():
                            child.send(pack)
                            measured.setdefault((pack, way, others), []).extend(child.recv())
    for pack, name in packs.items():
        for way in WAYS:
            quiet, beside = (1000 * median(measured[pack, way, others]) for others in (0, busy))
            yield ThreadsRow(name, way, quiet, beside)


@contextmanager
def _child(bundle: Path, threads: int, way: str) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, bundle, threads, way))
    before = dict(os.environ)
    os.environ["GOMP_SPINCOUNT"] = DEFAULT_SPINS if way == OPENMP else SPINS
    process.start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(connection: Connection, bundle: Path, threads: int, way: str) -> None:
    """Evaluate the packs that are requested, and answer with the seconds, until the pipe is closed."""
    from patchforge.model.denoiser import Evaluation, Memory
    from patchforge.model.device import prepare_cpu
    from patchforge.model.parallel import here
    from patchforge.model.pipeline import Pipeline
    from patchforge.model.types import Plan

    prepare_cpu(1 if way == ONE else threads, only_pictures=way != OPENMP)
    pipeline = Pipeline.open(bundle)
    condition = pipeline.condition_on((*pipeline.manifest.class_names, "a picture")[0])
    with ExitStack() as stack:
        if way == OPENMP:
            stack.enter_context(here())
        connection.send(None)
        while True:
            try:
                pack = connection.recv()
            except EOFError:
                return
            plans = [Plan(pipeline.noise(seed), (0.5,), guidance=2.0 if pack else 1.0) for seed in range(pack or 1)]
            evaluations = [Evaluation(plan, condition, Memory()) for plan in plans]
            seconds = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                pipeline.denoiser.evaluate(evaluations)
                seconds.append(time.perf_counter() - began)
            connection.send(seconds[1:])


@contextmanager
def _busy(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()

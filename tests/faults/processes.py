"""A process of the service, and the structured log it writes: start it, hurt it, wait for what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds for anything that has to happen; the machine may be busy with other things

# Ends with pytest, even one killed with -9: asks the kernel, then becomes the process to run.
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

T = TypeVar("T")
Line = dict[str, Any]


class Process:
    """A process of the service and the structured log it writes."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.log: list[Line] = []
        self.stray: list[str] = []  # what is no JSON line: there should be nothing
        self._news = threading.Condition()
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-SEc", _LAUNCH, str(os.getpid()), sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def processor_seconds(self) -> float:
        """The time it has spent working, however busy the machine is with other things."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mark(self) -> int:
        """A place in the log, to wait only for what comes after it."""
        return len(self.log)

    def wait_for(self, event: str, *, after: int = 0, seconds: float = PATIENCE, **fields: Any) -> Line:
        """The first log line of this event and these fields; fails with the log if the process ends first."""

        def found() -> Line | None:
            wanted = {"event": event, **fields}
            return next((line for line in self.log[after:] if wanted.items() <= line.items()), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, seconds)
            line = found()
        if line is None:
            why = f"ended with {self._process.wait()}" if self._ended else f"is silent after {seconds:.0f} s"
            raise AssertionError(f"no {event!r} {fields or ''}: {self.name} {why}\n{self.transcript()}")
        return line

    def lines(self, event: str, **fields: Any) -> list[Line]:
        """All log lines so far of this event and these fields."""
        return [line for line in list(self.log) if {"event": event, **fields}.items() <= line.items()]

    def transcript(self) -> str:
        """The log, for a person."""
        return "\n".join([f"--- {self.name}", *map(json.dumps, list(self.log)), *self.stray])

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        self._process.kill()
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status, 0 if it shut down as it should."""
        self._process.terminate()
        return self.wait()

    def pause(self) -> None:
        """SIGSTOP; returns once it stands still."""
        stop(self.pid)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit status, the log read to its end."""
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status

    def close(self) -> None:
        """Whatever its state, it is gone after this."""
        self._process.kill()
        self._process.wait()
        self._reader.join(10)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for text in stream:
                with self._news:
                    if text.startswith("{"):
                        self.log.append(json.loads(text))
                    else:
                        self.stray.append(text.rstrip())
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def stop(pid: int) -> None:
    """SIGSTOP; returns once the process stands still."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: stopped(pid), f"{pid} to stop")


def stopped(pid: int) -> bool:
    """All its threads stand still."""
    states = [(task / "stat").read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) <= {"T", "t"}


def eventually(attempt: Callable[[], T], what: str = "it", seconds: float = PATIENCE) -> T:
    """The first true answer. For what no log line or event tells."""
    give_up = time.monotonic() + seconds
    while not (result := attempt()):
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return result

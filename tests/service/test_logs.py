"""What processes write for operators."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

SCRIPT = """
from service.logs import configure_logs
from service.settings import Settings
import structlog
configure_logs(Settings(log_json=True), "worker")
structlog.get_logger().info("first", text="two\\nlines")
structlog.get_logger().info("second")
"""


def test_a_line_is_written_at_once_so_that_processes_can_share_a_stream() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # keeps every write apart
    with ours, theirs:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # as containers and the fault tests have it
        subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, env=environment, check=True, timeout=60)
        theirs.close()
        ours.settimeout(10)
        written = [ours.recv(65536), ours.recv(65536)]
    assert [line[-1:] for line in written] == [b"\n", b"\n"]
    assert [json.loads(line)["event"] for line in written] == ["first", "second"]

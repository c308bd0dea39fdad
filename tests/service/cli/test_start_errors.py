"""What a machine, an operator or a queue server can get wrong at start: one line that says what to do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from patchforge.service.embedded import EmbeddedServer
from tests.patience import PATIENCE
from tests.processes import PATCHFORGE, environment, run

AWAY = "redis://127.0.0.1:1/0"
WRONG_PASSWORD = "the queue server refuses the user or password in REDIS_URL or PATCHFORGE_REDIS_PASSWORD_FILE"
FREE = {"PATCHFORGE_HTTP_PORT": "0", "PATCHFORGE_GRPC_PORT": "0"}


def error_of(role: str, *before: str, status: int = 1, **settings: str) -> str:
    """The one line on stderr."""
    ran = run(*before, *PATCHFORGE, role, status=status, **FREE | settings)
    [line] = ran.stderr.splitlines()
    return line


@pytest.fixture
def taken() -> Iterator[str]:
    """A port of the loopback address that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield str(listening.getsockname()[1])


@pytest.mark.parametrize("name", ["PATCHFORGE_HTTP_PORT", "PATCHFORGE_GRPC_PORT"])
def test_a_port_in_use(name: str, taken: str) -> None:
    expected = f"error: {name}: port {taken} of 127.0.0.1 is in use: stop what uses it, or choose another"
    assert error_of("gateway", REDIS_URL=AWAY, **{name: taken}) == expected


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", "2001:db8::1"])
def test_an_address_of_another_machine(host: str) -> None:
    expected = f"error: PATCHFORGE_HOST: {host} is not an address of this machine"
    assert error_of("gateway", REDIS_URL=AWAY, PATCHFORGE_HOST=host) == expected


@pytest.mark.parametrize("folder", ["/dev/null", "/proc/nothing"])
def test_a_data_folder_that_cannot_be_used(folder: str) -> None:
    line = error_of("serve", PATCHFORGE_DATA_DIR=folder)
    assert line.startswith(f"error: the data folder {folder}/queue cannot be used: ")
    assert line.endswith("; set PATCHFORGE_DATA_DIR to another")


def test_a_log_level_that_does_not_exist() -> None:
    line = error_of("gateway", status=2, REDIS_URL=AWAY, PATCHFORGE_LOG_LEVEL="LOUD")
    assert line == "error: invalid setting: PATCHFORGE_LOG_LEVEL: must be DEBUG, INFO, WARNING or ERROR"


def test_settings_are_named_as_they_are_set() -> None:
    line = error_of("gateway", status=2, REDIS_URL=AWAY, PATCHFORGE_HTTP_PORT="x", PATCHFORGE_API_KEYS='["s3cret"]')
    assert "PATCHFORGE_HTTP_PORT: " in line
    assert "PATCHFORGE_API_KEYS[0]: " in line
    assert "s3cret" not in line


def test_an_argument_that_is_not_utf_8(bundle_dir: Path) -> None:
    for words in (
        ["hash-key", b"ca\xe9"],
        ["generate", b"ca\xe9", "--bundle", bundle_dir / "tiny-class"],
        [b"serv\xe9"],
    ):
        ran = subprocess.run([*PATCHFORGE, *words], env=environment(), capture_output=True, timeout=PATIENCE)
        assert ran.returncode in (1, 2)
        assert b"rror: " in ran.stderr
        assert b"Traceback" not in ran.stderr


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A queue server with users: `guest` may not run INFO."""
    with EmbeddedServer(tmp_path) as server, Redis.from_url(server.url) as redis:
        redis.acl_setuser(
            "guest", enabled=True, passwords=["+open"], keys=["*"], channels=["*"], commands=["+@all", "-info"]
        )
        yield server


@pytest.mark.parametrize(
    ("role", "user", "number", "expected"),
    [
        ("gateway", "guest:open@", 0, "the queue server's user may not run INFO: allow it with ACL SETUSER"),
        ("gateway", "guest:wr0ng@", 0, WRONG_PASSWORD),
        ("worker", "guest:wr0ng@", 0, WRONG_PASSWORD),
        ("gateway", "", 7, "the queue server has no database with the number in REDIS_URL"),
    ],
)
def test_a_queue_server_that_refuses_us(
    guarded: EmbeddedServer, bundle_dir: Path, role: str, user: str, number: int, expected: str
) -> None:
    url = guarded.url.replace("//", f"//{user}").replace("/0", f"/{number}")
    ran = run(
        *(*PATCHFORGE, role),
        status=1,
        REDIS_URL=url,
        PATCHFORGE_BUNDLE_DIR=str(bundle_dir),
        PATCHFORGE_PATCH_BUDGET="64",
        **FREE,
    )
    assert ran.stderr.splitlines()[-1] == f"error: {expected}"
    assert "Traceback" not in ran.stderr
    assert "wr0ng" not in ran.stderr


def test_what_is_no_queue_server(bundle_dir: Path) -> None:
    """Something else listens there: here, one that speaks HTTP."""
    script = """
import socket, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["REDIS_URL"] = f"redis://127.0.0.1:{server.server_port}/0"
from patchforge.service.cli.main import app
app(["gateway"])
"""
    ran = run(sys.executable, "-c", script, status=1, **FREE)
    expected = "error: what answers at REDIS_URL is no Redis server, or expects TLS: rediss://"
    assert [line for line in ran.stderr.splitlines() if line.startswith("error")] == [expected]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs its own mounts")
@pytest.mark.parametrize("role", ["gateway", "serve"])
def test_no_folder_for_temporary_files(role: str) -> None:
    mounts = 'for each in /tmp /var/tmp; do mount -t tmpfs -o ro none $each; done; cd /sys; exec "$@"'
    command = ("unshare", "-m", "sh", "-c", mounts, "sh")
    if subprocess.run([*command, "true"], capture_output=True).returncode or os.access("/usr/tmp", os.W_OK):
        pytest.skip("may not mount")
    expected = "error: TMPDIR: no folder for temporary files can be written: free space in /tmp, or name another folder"
    assert error_of(role, *command, REDIS_URL=AWAY) == expected


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs its own mounts")
@pytest.mark.parametrize("option", ["size=4k", "ro"])
def test_a_data_folder_on_a_disk_that_is_full_or_read_only(option: str, tmp_path: Path) -> None:
    command = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {option} none {tmp_path}; exec "$@"', "sh")
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("may not mount")
    why = "No space left on device" if option == "size=4k" else "Read-only file system"
    line = error_of("serve", *command, PATCHFORGE_DATA_DIR=str(tmp_path))
    assert line == f"error: the data folder {tmp_path}/queue cannot be used: {why}; set PATCHFORGE_DATA_DIR to another"

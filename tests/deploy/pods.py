"""Containers of built images, run by runc as a cluster would: read-only, without rights, and all in one network."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.deploy.images import Buildah
from tests.processes import Line, Process, eventually

PLACES = {  # the only ones that can be written, the first by nobody but root
    "/dev": ["nosuid", "mode=755"],
    "/dev/shm": ["nosuid", "nodev", "mode=1777"],
    "/tmp": ["nosuid", "nodev", "mode=1777"],
}


def missing() -> str:
    return "" if shutil.which("runc") else "running containers without Docker needs runc"


class Container:
    """One container. It has what its image says: user, variables, command and HEALTHCHECK."""

    def __init__(self, name: str, runc: list[str], bundle: Path, config: dict) -> None:
        self.name, self._runc, self._config = name, runc, config
        self.process = Process(name, *runc, "run", "--bundle", str(bundle), name)

    def wait_for(self, event: str) -> Line:
        """Waits for a line in its log."""
        return self.process.wait_for(event)

    def run(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        """Runs a command in the container, as its user."""
        user = self._config["User"]
        return subprocess.run([*self._runc, "exec", "--user", user, self.name, *command], capture_output=True)

    def healthy(self) -> bool:
        """Runs the HEALTHCHECK once."""
        kind, *command = self._config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.run(*command).returncode == 0

    @property
    def init(self) -> int:
        """The process ID, on this machine, of the container's first process."""

        def running() -> int:
            assert self.process.running, self.process.transcript()
            told = subprocess.run([*self._runc, "state", self.name], capture_output=True)
            state = json.loads(told.stdout) if told.returncode == 0 else {"status": "none"}
            return state["pid"] if state["status"] == "running" else 0

        return eventually(running, f"{self.name} to run")

    def stop(self) -> int:
        """Stops it like `docker stop`, and returns its exit status."""
        subprocess.run([*self._runc, "kill", self.name, "TERM"], check=True)
        return self.process.wait()

    def close(self) -> None:
        """Ends it whatever its state."""
        subprocess.run([*self._runc, "delete", "--force", self.name], capture_output=True)
        self.process.close()
        print(self.process.transcript())  # pytest shows it if the test failed


class Pod:
    """Containers with one network of their own, which only has a loopback interface."""

    def __init__(self, buildah: Buildah, folder: Path) -> None:
        self._buildah, self._folder, self._stack = buildah, folder, ExitStack()
        self._runc = [shutil.which("runc") or "runc", "--root", str(folder / "runc")]
        self._first: Container | None = None

    def close(self) -> None:
        """Ends all containers, the last one first."""
        self._stack.close()

    def start(self, name: str, image: str, *command: str, **variables: str) -> Container:
        """Starts a container. `command` replaces the image's; `variables` are added to its own."""
        config = self._buildah.config(image)
        root = self._stack.enter_context(self._buildah.mounted(image))
        bundle = self._folder / name
        bundle.mkdir()
        config = config | {"Cmd": [*command] or config["Cmd"]}
        config["Env"] = [*config["Env"], *(f"{key}={value}" for key, value in variables.items())]
        (bundle / "config.json").write_text(json.dumps(self._spec(config, root)), "utf-8")
        container = Container(name, self._runc, bundle, config)
        self._stack.callback(container.close)
        self._first = self._first or container
        return container

    def _spec(self, config: dict, root: Path) -> dict:
        uid, gid = map(int, config["User"].split(":"))
        network = {"type": "network"} | ({"path": f"/proc/{self._first.init}/ns/net"} if self._first else {})
        mounts = [{"destination": "/proc", "type": "proc", "source": "proc"}]
        for place, options in PLACES.items():
            mounts.append({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options})
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": uid, "gid": gid},
                "args": [*(config["Entrypoint"] or []), *config["Cmd"]],
                "env": config["Env"],
                "cwd": config["WorkingDir"],
                "capabilities": {},
                "noNewPrivileges": True,
            },
            "root": {"path": str(root), "readonly": True},
            "mounts": mounts,
            "linux": {"namespaces": [network, *({"type": kind} for kind in ("pid", "mount", "ipc", "uts"))]},
        }

"""Builds the images, with Docker or without: what `make images` does.

If no Docker engine answers, buildah builds them from the same Dockerfile. It needs Linux and root, but no engine and no
namespaces of its own. If the base image cannot be pulled either, debootstrap makes one. Needs nothing beyond Python.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TARGETS = ("gateway", "worker")
STORE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchforge-images"
DEBIAN = "bookworm"
DEBIAN_PYTHON = "cp311"
DEBIAN_BASE = f"localhost/patchforge-base:{DEBIAN}"
NEEDED = ("python3", "python3-venv", "ca-certificates")
BULK = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/man", "usr/share/locale", "usr/share/info")
LABEL = "patchforge.inputs"
PIP = "/root/.config/pip"  # in the container, whose user cannot look into it later
PIP_OPTIONS = ("index-url", "extra-index-url", "find-links", "trusted-host", "cert")


def tag(target: str) -> str:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    return f"patchforge-{target}:{version}"


def pinned_base() -> str:
    """Returns the base image that the Dockerfile names."""
    [found] = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    return found


def missing() -> str:
    """Returns what a build without Docker lacks here, or an empty text."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "building without Docker needs Linux and root"
    return "" if shutil.which("buildah") else "building without Docker needs buildah"


def docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def build_with_docker(targets: list[str], arguments: dict[str, str]) -> None:
    for target in targets:
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        command = ["docker", "build", "--target", target, *words, "-t", tag(target), "."]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"DOCKER_BUILDKIT": "1"})


class Buildah:
    """Images in a folder of their own, so that nothing else on this machine sees them."""

    def __init__(self, store: Path = STORE) -> None:
        self.store = store
        store.mkdir(mode=0o700, parents=True, exist_ok=True)

    @cached_property
    def command(self) -> list[str]:
        folders = ["--root", str(self.store / "storage"), "--runroot", str(self.store / "run")]
        for driver in ("overlay", "vfs"):  # the second copies each layer, but works everywhere
            command = ["buildah", *folders, "--storage-driver", driver]
            if subprocess.run([*command, "info"], capture_output=True).returncode == 0:
                return command
        raise SystemExit(f"buildah cannot keep images in {self.store}")

    def __call__(self, *words: str | Path) -> str:
        """Runs a buildah command and returns what it prints."""
        ran = subprocess.run([*self.command, *map(str, words)], capture_output=True, text=True)
        if ran.returncode != 0:
            raise RuntimeError(f"buildah {words[0]} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}")
        return ran.stdout.strip()

    def has(self, image: str) -> bool:
        return subprocess.run([*self.command, "inspect", "--type", "image", image], capture_output=True).returncode == 0

    def config(self, image: str) -> dict[str, Any]:
        """Returns the image's user, variables, command and HEALTHCHECK."""
        return json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Yields the folder with the image's files."""
        container = self("from", "--pull-never", image)
        try:
            yield Path(self("mount", container))
        finally:
            self("rm", container)

    def size(self, image: str) -> str:
        """Returns the size of all layers together, uncompressed."""
        [listed] = json.loads(self("images", "--json", image))
        return listed["size"]

    def base(self) -> str:
        """Returns the base image that the Dockerfile names, or if it cannot be pulled, one like it."""
        for known in (pinned_base(), DEBIAN_BASE):
            if self.has(known):
                return known
        try:
            self("pull", pinned_base())
            return pinned_base()
        except RuntimeError as error:
            print(f"{error}\nThe base image cannot be pulled. Making one of Debian {DEBIAN} ...", flush=True)
        self.make_base()
        return DEBIAN_BASE

    def make_base(self) -> None:
        if shutil.which("debootstrap") is None:
            raise SystemExit("Without a base image, debootstrap is needed.")
        with tempfile.TemporaryDirectory(dir=self.store) as temporary:
            debian = Path(temporary) / "debian"
            command = ["debootstrap", "--variant=minbase", f"--include={','.join(NEEDED)}", DEBIAN, str(debian)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for name in BULK:
                shutil.rmtree(debian / name)
                (debian / name).mkdir()
            for path in (debian / "usr/share/doc").rglob("*"):
                if path.name != "copyright" and not (path.is_dir() and not path.is_symlink()):
                    path.unlink()
            container = self("from", "scratch")
            self("add", container, debian, "/")
            self("commit", "--rm", container, DEBIAN_BASE)

    def build(self, target: str, arguments: dict[str, str]) -> None:
        """Builds one image, unless it was built from these very files. `arguments` are the Dockerfile's."""
        base = arguments.get("BASE") or self.base()
        arguments = {"BASE": base} | index_for_torch(base) | arguments
        inputs = digest_of_inputs(arguments)
        if self.has(tag(target)) and (self.config(tag(target))["Labels"] or {}).get(LABEL) == inputs:
            return
        with tempfile.TemporaryDirectory(dir=self.store) as folder:
            options = ["--isolation", "chroot", "--format", "docker"]  # OCI's own format has no HEALTHCHECK
            options += ["--label", f"{LABEL}={inputs}"]
            for name, value in arguments.items():
                options += ["--build-arg", f"{name}={value}"]
            for source, place in pip_mounts(Path(folder)):
                options += ["--volume", f"{source}:{place}:ro"]
            command = [*self.command, "build", "--target", target, *options, "-t", tag(target), "."]
            subprocess.run(command, cwd=ROOT, check=True)


def digest_of_inputs(arguments: dict[str, str]) -> str:
    """Returns a digest of everything that a build reads of this checkout."""
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    left_out = tuple(line for line in ignored if re.match(r"[a-z]", line))
    sources = [ROOT / line[1:] for line in ignored if line.startswith("!")]
    files = [path for source in sources for path in ([source] if source.is_file() else source.rglob("*"))]
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for path in sorted([*files, ROOT / "Dockerfile", ROOT / ".dockerignore"]):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and "__pycache__" not in path.parts and not name.startswith(left_out):
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def pip_configuration() -> dict[str, list[str]]:
    """Returns how pip finds packages on this machine. An index in a folder is left out: its links may lead anywhere."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, list[str]] = {}
    for line in sorted(listed.splitlines(), reverse=True):  # variables of the environment win: they begin with a colon
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2]
        if option in PIP_OPTIONS:
            found[option] = [each for each in str(ast.literal_eval(value)).split() if not each.startswith("file:")]
    return {option: values for option, values in found.items() if values}


def pip_mounts(folder: Path) -> list[tuple[Path, str]]:
    """Writes this machine's pip configuration into `folder`, for pip in the container.

    Returns what to mount where: the folder, and in it the files that the configuration names. No image has them.
    """
    places, lines = {folder: PIP}, ["[global]"]
    for option, values in pip_configuration().items():
        lines.append(f"{option} = {' '.join(_moved(value, folder, places) for value in values)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n", "utf-8")
    return [*places.items()]


def index_for_torch(base: str) -> dict[str, str]:
    """Returns the argument for an index that has torch's dependencies, if pip finds a CPU build of torch by itself."""
    pip = pip_configuration()
    found = [
        path for folder in pip.get("find-links", []) for path in Path(folder).glob(f"torch-*+cpu-{DEBIAN_PYTHON}-*")
    ]
    return {"TORCH_INDEX": pip["index-url"][0]} if found and "index-url" in pip and base == DEBIAN_BASE else {}


def _moved(value: str, folder: Path, places: dict[Path, str]) -> str:
    """Returns an option's value as it reads in the container. `places` gets what must be mounted for it."""
    path = Path(value)
    if not path.is_absolute() or not path.exists():
        return value
    if path not in places:
        place = folder / str(len(places))
        if path.is_dir():
            place.mkdir()
        else:
            place.touch()
        places[path] = f"{PIP}/{place.name}"
    return places[path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--base", help="the base image, instead of the Dockerfile's")
    parser.add_argument("--torch-index", help="the package index for torch, instead of PyTorch's own")
    chosen = parser.parse_args()
    arguments = {"BASE": chosen.base, "TORCH_INDEX": chosen.torch_index}
    given = {name: value for name, value in arguments.items() if value}
    if docker_answers():
        build_with_docker(chosen.targets, given)
        return
    if missing():
        raise SystemExit(f"No Docker engine answers, and {missing()}.")
    buildah = Buildah()
    for target in chosen.targets:
        buildah.build(target, given)
        print(f"{tag(target)}: {buildah.size(tag(target))}, in {buildah.store}", flush=True)


if __name__ == "__main__":
    main()

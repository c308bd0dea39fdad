"""What `make package` checks: wheel and sdist are complete, and an installation with each extra works.

`python -m tests.deploy.package DIST` takes the folder with both. The machine needs a package index; the environments
are made in a temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.patience import PATIENCE
from tests.service.cli.test_extras import COMMANDS

ROOT = Path(__file__).parents[2]
PROMPT = "red apple, 3d"


def run(*command: str | Path, cwd: Path, status: int = 0, **environment: str) -> str:
    """Runs a command like a user, without anything from this checkout, and returns its output."""
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=_environment(environment), capture_output=True, text=True)
    if ran.returncode != status:
        raise AssertionError(f"{command} ended with {ran.returncode}, not {status}:\n{ran.stdout}{ran.stderr}")
    return ran.stdout + ran.stderr


def _environment(settings: dict[str, str]) -> dict[str, str]:
    ours = ("PATCHFORGE_", "REDIS_URL", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {f"PATCHFORGE_{name}": value for name, value in settings.items()}


def copy_of_the_tree(folder: Path) -> Path:
    """Returns the files under version control; links stay links. A build leaves its files in a copy of these."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).exists():  # it may have just been deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build_wheel(out: Path) -> Path:
    """Builds the wheel with pip, from a copy of the tree. pip brings the build's own tools."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = copy_of_the_tree(Path(temporary) / "tree")
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", out, tree, cwd=tree)
    [wheel] = out.glob("*.whl")
    return wheel


def expected_files() -> set[str]:
    """Returns the files of the package: what git tracks under model/, service/ and patchforge/, and the stubs."""
    listed = subprocess.run(
        ["git", "ls-files", "model", "service", "patchforge"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = {name if name.startswith("patchforge/") else f"patchforge/{name}" for name in listed}
    files -= {"patchforge/model", "patchforge/service"}  # the links
    for proto in (ROOT / "proto").rglob("*.proto"):
        stub = f"patchforge/service/pb/{proto.relative_to(ROOT / 'proto').with_suffix('')}"
        files |= {f"{stub}_pb2.py", f"{stub}_pb2.pyi", f"{stub}_pb2_grpc.py"}
    return files


def contents(archive: Path) -> dict[str, str]:
    """Returns name → SHA-256 of the files in a wheel or an sdist; for an sdist, without the folder around them."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        found = {}
        for member in sdist.getmembers():
            if (file := sdist.extractfile(member)) is not None:
                found[member.name.partition("/")[2]] = hashlib.sha256(file.read()).hexdigest()
        return found


def check_wheel(wheel: Path) -> int:
    """Checks that a wheel has all its files and no others, and returns their number."""
    files = {name for name in contents(wheel) if ".dist-info/" not in name}
    wanted = expected_files()
    assert files == wanted, f"missing: {sorted(wanted - files)}; not ours: {sorted(files - wanted)}"
    return len(files)


def check_sdist(sdist: Path) -> int:
    """Checks an sdist in the same way. It also contains the files that the wheel is built from."""
    files = set(contents(sdist))
    wanted = expected_files() | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md"}
    assert wanted <= files, f"missing: {sorted(wanted - files)}"
    assert not [name for name in files if name.startswith(("tests/", "docs/"))]
    return len(files)


def install(wheel: Path, extra: str, folder: Path) -> Path:
    """Makes a fresh environment with the wheel and one extra, or none; yields its folder of programs."""
    venv.create(folder, with_pip=True, symlinks=True)
    target = f"{wheel}[{extra}]" if extra else str(wheel)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", target, cwd=folder)
    run(*pip, "check", cwd=folder)
    return folder / "bin"


def check_base(programs: Path, empty: Path) -> str:
    """Checks that the client can be imported, and that every command that needs more names the extra in one line."""
    program = "import patchforge as p; p.Client().close(); p.AsyncClient; print(p.__version__)"
    version = run(programs / "python", "-c", program, cwd=empty).strip()
    for command, extra in COMMANDS.items():
        [line] = run(programs / "patchforge", *command.split(), cwd=empty, status=1).splitlines()
        assert line.endswith(f"is not installed: pip install 'patchforge[{extra}]'"), line
    packages = run(programs / "python", "-m", "pip", "list", "--format", "freeze", cwd=empty).splitlines()
    return f"client {version} imports; {len(COMMANDS)} commands name their extra; {len(packages)} packages"


def check_server(programs: Path, empty: Path) -> str:
    """Checks that a gateway serves its page and its API document, and that drawing commands name their extra."""
    settings = {"REDIS_URL": "redis://127.0.0.1:1/0"}  # no queue: the gateway is not ready, but serves everything else
    with _running([programs / "patchforge", "gateway"], empty, "gateway is listening", **settings) as http:
        for path in ("/healthz", "/", "/playground/app.js", "/openapi.json", "/docs"):
            with urllib.request.urlopen(http + path, timeout=PATIENCE) as answer:
                assert answer.status == 200, path
    for command, extra in (("serve", "all"), ("worker", "worker"), ("generate cat", "worker")):
        said = run(programs / "patchforge", *command.split(), cwd=empty, status=1)
        assert f"pip install 'patchforge[{extra}]'" in said, said
    return "the gateway starts"


def check_worker(programs: Path, empty: Path) -> str:
    """Draws a picture with the wheel alone."""
    run(programs / "patchforge", "generate", PROMPT, "--seed", "7", "--out", "offline", cwd=empty)
    assert _picture(empty / "offline").size == (256, 256)
    return f"a picture of {PROMPT!r}, without a server"


def check_all(programs: Path, empty: Path) -> str:
    """Runs `serve`, and draws the same picture over HTTP."""
    with _running([programs / "patchforge", "serve"], empty, "ready for requests") as http:
        asked = (programs / "patchforge", "generate", PROMPT, "--seed", "7", "--model", "emoji-text", "--server", http)
        run(*asked, "--out", "online", cwd=empty)
    assert _picture(empty / "online").size == (256, 256)
    return f"a picture of {PROMPT!r}, over HTTP"


CHECKS = {"": check_base, "server": check_server, "worker": check_worker, "all": check_all}


def _picture(folder: Path) -> Image.Image:
    [path] = folder.glob("*.png")
    with Image.open(path) as picture:
        picture.load()
        assert len(picture.getcolors(1 << 16) or ()) > 50, "a picture of one colour"
        return picture


@contextmanager
def _running(command: list[str | Path], folder: Path, event: str, **settings: str) -> Iterator[str]:
    """Starts a server on free ports, waits until it logs `event`, and yields its URL."""
    known = {"HTTP_PORT": "0", "GRPC_PORT": "0", "DRAIN_SECONDS": "1"} | settings
    words = [*map(str, command)]
    process = subprocess.Popen(words, cwd=folder, env=_environment(known), stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        give_up = time.monotonic() + PATIENCE
        while not any(event in line for line in said):
            if process.poll() is not None or time.monotonic() > give_up:
                raise AssertionError(f"{command} is not ready:\n{''.join(said)}")
            time.sleep(0.1)
        address = re.search(r"http=(http://[\d.:]+)", "".join(said))
        assert address is not None, said
        yield address[1]
    finally:
        process.terminate()
        assert process.wait(60) == 0, "".join(said)


def main(dist: Path) -> None:
    """Raises AssertionError at the first thing that is wrong."""
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    print(f"{wheel.name}: {check_wheel(wheel)} files, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    print(f"{sdist.name}: {check_sdist(sdist)} files, {sdist.stat().st_size / 2**20:.1f} MiB", flush=True)
    with tempfile.TemporaryDirectory(prefix="patchforge-package-") as temporary:
        folder = Path(temporary)
        assert contents(build_wheel(folder / "tree")) == contents(wheel), "the tree builds another wheel than the sdist"
        print("the tree builds the same wheel as the sdist", flush=True)
        for extra, check in CHECKS.items():
            empty = folder / f"empty-{extra}"
            empty.mkdir()
            environment = folder / "environment"
            said = check(install(wheel.resolve(), extra, environment), empty)
            print(f"[{extra or 'base'}] {said}", flush=True)
            shutil.rmtree(environment)  # it has gigabytes if torch is for GPUs
    print("package: all checks passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

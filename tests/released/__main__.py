"""`python -m tests.released build COMMIT`: writes the wheel of a commit, without weights and playground.

It needs Git's history and a package index. The same commit gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

HERE = Path(__file__).parent
STUBS = "grpcio-tools==1.76.0"  # as in pyproject.toml
LEFT_OUT = "*.safetensors", "bundles", "emoji_judge", "playground/*"
KEPT = "icon.svg"  # so that the folder that a gateway serves is there


def build(commit: str) -> Path:
    """Writes the wheel of a commit into this folder; its version ends in the commit."""
    [commit, seconds] = output("git", "log", "-1", "--format=%h %ct", "--abbrev=7", commit).decode().split()
    with tempfile.TemporaryDirectory() as temporary:
        tree, tools, built = (Path(temporary) / name for name in ("tree", "tools", "built"))
        with tarfile.open(fileobj=BytesIO(output("git", "archive", commit))) as archive:
            archive.extractall(tree, filter="tar")
        shrink(tree)
        about = tree / "pyproject.toml"
        about.write_text(about.read_text("utf-8").replace('version = "0.1.0"', f'version = "0.1.0+{commit}"'), "utf-8")
        if not (tree / "setup.py").exists():
            write_stubs(tree, tools)
        pip("wheel", "--no-deps", "--wheel-dir", str(built), str(tree), SOURCE_DATE_EPOCH=seconds)
        [wheel] = built.iterdir()
        return Path(shutil.copy(wheel, HERE))


def shrink(tree: Path) -> None:
    for pattern in LEFT_OUT:
        for path in sorted((tree / "model").rglob(pattern)) + sorted((tree / "service").rglob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != KEPT:
                path.unlink()


def write_stubs(tree: Path, tools: Path) -> None:
    """Generates gRPC's code, as the Makefile of a version without a setup.py did."""
    pip("install", "--target", str(tools), STUBS)
    protos = [str(path.relative_to(tree)) for path in sorted((tree / "proto").rglob("*.proto"))]
    outputs = ["--python_out=.", "--grpc_python_out=.", "--pyi_out=."]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iservice/pb=proto", *outputs, *protos]
    subprocess.run(command, check=True, cwd=tree, env=os.environ | {"PYTHONPATH": str(tools)})


def pip(*words: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env=os.environ | variables)


def output(*command: str) -> bytes:
    return subprocess.run(command, check=True, cwd=HERE.parents[1], stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", commit]:
            print(build(commit))
        case _:
            sys.exit("usage: python -m tests.released build COMMIT")

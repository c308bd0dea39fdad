"""Versions of this program that run beside each other: the installed one, and others from wheels or folders."""

from __future__ import annotations

import sys
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path

from patchforge.service.errors import InvalidRequest

NAME = "patchforge"


@dataclass(frozen=True)
class Version:
    """How to start one version."""

    name: str
    command: tuple[str, ...]
    """What precedes `gateway` or `worker`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that it needs in addition."""


TODAY = Version("this version", (sys.executable, "-P", "-m", NAME))


def other_version(path: Path, folder: Path) -> Version:
    """Returns the version at `path`: a wheel, a virtual environment, or a folder that contains the package.

    A wheel is unpacked into `folder`, which must not exist yet, and runs with this version's dependencies, as code in
    a folder does.

    Raises:
        InvalidRequest: there is none.
    """
    path = path.resolve()
    if (python := path / "bin" / "python").exists():
        return Version(path.name, (str(python), "-P", "-m", NAME))
    if (path / NAME / "__main__.py").exists():
        return Version(path.name, TODAY.command, {"PYTHONPATH": str(path)})
    if not zipfile.is_zipfile(path):
        raise InvalidRequest(f"{path} is neither a wheel, nor a virtual environment, nor a folder with {NAME}/")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(folder)
    return Version(path.name.split("-")[1], _script(folder), {"PYTHONPATH": str(folder)})


def _script(unpacked: Path) -> tuple[str, ...]:
    """What pip would write as the wheel's script."""
    scripts = ConfigParser(delimiters="=")
    scripts.read(unpacked.glob("*.dist-info/entry_points.txt"), "utf-8")
    if not scripts.has_option("console_scripts", NAME):
        raise InvalidRequest(f"the wheel has no command {NAME}")
    module, _, function = scripts["console_scripts"][NAME].partition(":")
    return sys.executable, "-P", "-c", f"from {module} import {function}; {function}()"

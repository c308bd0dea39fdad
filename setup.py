"""The one build step that pyproject.toml cannot express: gRPC stubs are generated from `proto/`.

They are part of the package in every build: a wheel, an sdist, and, in place, an editable install.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "patchforge.service.pb"


def generate_stubs() -> list[str]:
    """Write the stubs of every `.proto` file, and return their packages."""
    from grpc_tools import protoc

    protos = sorted(path.as_posix() for path in Path("proto").rglob("*.proto"))
    command = ["protoc", f"-I{PACKAGE.replace('.', '/')}=proto", f"-I{files('grpc_tools') / '_proto'}"]
    outputs = ["--python_out=.", "--grpc_python_out=.", "--pyi_out=."]
    if protoc.main([*command, *outputs, *protos]) != 0:
        raise SystemExit("protoc failed: see above")
    folders = {Path(path).relative_to("proto").parent for path in protos}
    return sorted(".".join([PACKAGE, *folder.parts]) for folder in folders)


class BuildWithStubs(build_py):
    """Generates the stubs before setuptools lists the modules."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [*self.packages, *(name for name in generate_stubs() if name not in self.packages)]


setup(cmdclass={"build_py": BuildWithStubs})

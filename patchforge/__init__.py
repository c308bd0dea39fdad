"""Patch Forcing image generation: a client for a running server, and pictures without one.

`Client` and `AsyncClient` need nothing but the base install; `Pipeline` needs the extra `worker`. What they
raise is a `PatchforgeError` from a server, and a `ModelError` from a pipeline.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchforge.model.errors import ModelError
    from patchforge.model.pipeline import Pipeline
    from patchforge.service.client import AsyncClient, Client
    from patchforge.service.errors import PatchforgeError

    __version__: str

__all__ = ["AsyncClient", "Client", "ModelError", "PatchforgeError", "Pipeline", "__version__"]

_HOMES = {
    "AsyncClient": "patchforge.service.client",
    "Client": "patchforge.service.client",
    "ModelError": "patchforge.model.errors",
    "PatchforgeError": "patchforge.service.errors",
    "Pipeline": "patchforge.model.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a client shall not load PyTorch.

    Raises:
        ModuleNotFoundError: `Pipeline` without the packages of the extra `worker`.
    """
    if name == "__version__":
        return import_module("importlib.metadata").version("patchforge")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if name != "Pipeline" or (error.name or "").startswith("patchforge"):
            raise
        advice = f"Pipeline needs the package {error.name}, which is not installed: pip install 'patchforge[worker]'"
        raise ModuleNotFoundError(advice, name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

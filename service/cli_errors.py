"""How the command line shows errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from service.errors import PatchforgeError


@contextmanager
def typed_errors() -> Iterator[None]:
    """Show the project's own errors as one line, exit status 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except Exception as error:
        # Commands of the gateway must not import `model`, so ask only if it is there.
        model_errors = sys.modules.get("model.errors")
        expected = (PatchforgeError,) if model_errors is None else (PatchforgeError, model_errors.ModelError)
        if not isinstance(error, expected):
            raise
        field, message = getattr(error, "field", None), str(error)
        if field and not message.startswith(f"{field}:"):
            message = f"{field}: {message}"
        Console(stderr=True, highlight=False).print(f"error: {message}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error

"""How the command line shows errors."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer
from rich.console import Console

from patchforge.service.errors import InvalidRequest, PatchforgeError

Tell = Callable[[str], None]
"""Shows an error message to whoever started the command."""


def show_error(message: str) -> None:
    """One line on stderr, after all that was logged. What stderr does not take is lost; the exit status remains."""
    if logs := sys.modules.get("patchforge.service.logs"):
        logs.drain_logs()
    # Arguments and file names may hold bytes that are not UTF-8.
    shown = message.encode("utf-8", "backslashreplace").decode()
    with suppress(OSError):
        Console(stderr=True, highlight=False).print(f"error: {shown}", markup=False, soft_wrap=True)


@contextmanager
def typed_errors(tell: Tell = show_error) -> Iterator[None]:
    """Show the project's own errors, and those of files, as one line with exit status 1.

    Other errors are bugs and keep their traceback.
    """
    try:
        yield
    except Exception as error:
        if (message := _explain(error)) is None:
            raise
        tell(message)
        raise typer.Exit(1) from error


def _explain(error: Exception) -> str | None:
    """One line for an error that is no bug; else None."""
    # The gateway's commands must not import the model code, so look only if it is loaded already.
    model_errors = sys.modules.get("patchforge.model.errors")
    ours = (PatchforgeError,) if model_errors is None else (PatchforgeError, model_errors.ModelError)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if not isinstance(error, ours):
        return None
    field, message = getattr(error, "field", None), str(error)
    return f"{field}: {message}" if field and not message.startswith(f"{field}:") else message


def check_temporary_folder() -> None:
    """Check that there is one, before a library misses it and says something else.

    Raises:
        InvalidRequest: no folder for temporary files can be written.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        message = "no folder for temporary files can be written: free space in /tmp, or name another folder"
        raise InvalidRequest(message, field="TMPDIR") from error


@contextmanager
def needs(extra: str, tell: Tell = show_error) -> Iterator[None]:
    """Report a missing package as one line that names `extra`, with exit status 1. Also works as a decorator."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "patchforge").partition(".")[0]
        if package == "patchforge":  # then our own code is broken
            raise
        tell(f"this needs the package {package}, which is not installed: pip install 'patchforge[{extra}]'")
        raise typer.Exit(1) from error


class StartReport:
    """Where a worker says why it cannot start: on stderr, or to the supervisor that started it.

    The supervisor reads a pipe, and stops if it contains anything. A running worker writes nothing there: what ends it
    may be temporary, so the supervisor starts another one.
    """

    def __init__(self, pipe: int | None) -> None:
        """`pipe`: the file descriptor to write to, if there is a supervisor."""
        self._pipe = pipe

    def __call__(self, message: str) -> None:
        if self._pipe is None:
            show_error(message)
        else:
            os.write(self._pipe, message.encode()[:LONGEST_REASON])

    def started(self) -> None:
        """Call this when the worker runs. Later errors go to stderr."""
        if self._pipe is not None:
            os.write(self._pipe, STARTED)
            os.close(self._pipe)
            self._pipe = None

    @contextmanager
    def telling_of_bugs(self) -> Iterator[None]:
        """Tell the supervisor of an error without an explanation too, which another worker would meet as well."""
        try:
            yield
        except Exception as error:
            if self._pipe is not None and _explain(error) is None and not isinstance(error, ModuleNotFoundError):
                self(f"{type(error).__name__}: {error}")
            raise


STARTED = b"\0"
"""What the supervisor finds in the pipe of a worker that runs."""
LONGEST_REASON = 4096
"""In bytes. A pipe holds at least this much, so writing never blocks."""

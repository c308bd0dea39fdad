"""Standard streams that were closed before the program began."""

from __future__ import annotations

import os
import sys


def open_missing_streams() -> None:
    """Open the null device in place of a closed stdin, stdout or stderr.

    Otherwise the next file or connection would get its number, and whatever writes to stderr would write into that.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number, inheritable=True)
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115

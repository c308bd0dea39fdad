"""Runs the command line in a process whose clock is wrong by PATCHFORGE_CLOCK_OFF seconds."""

from __future__ import annotations

import os
import time

OFF = float(os.environ["PATCHFORGE_CLOCK_OFF"])
_time, _time_ns = time.time, time.time_ns


if __name__ == "__main__":
    time.time = lambda: _time() + OFF
    time.time_ns = lambda: _time_ns() + int(OFF * 1e9)

    from patchforge.service.cli.main import app  # imported late, so that no module has read the true clock

    app()

"""Runs a command beside six busy loops, on two cores: `python tests/busy.py make test`.

What passes so depends on no speed: each loop takes as much of the processor as the command's busiest process.
"""

from __future__ import annotations

import os
import subprocess
import sys

LOOPS, CORES = 6, 2
LOOP = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # it ends with this process, however that ends


def main() -> int:
    if hasattr(os, "sched_setaffinity"):  # Linux's; elsewhere the loops have every core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(LOOPS)]
    try:
        return subprocess.call(sys.argv[1:])
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main())

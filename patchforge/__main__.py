"""`python -m patchforge`: the command line."""

import os
import sys

# Python puts the working directory first on the path of `-m`, unless it is run with `-P`. Whatever lies there is not
# ours: a user's own `redis.py` or `torch/` must not take the place of what we import.
if not sys.flags.safe_path and sys.path and os.path.abspath(sys.path[0]) == os.getcwd():
    del sys.path[0]

from patchforge.service.cli.main import app

app()

"""Runs the command line in a process that has enough time to export its last spans."""

from __future__ import annotations

from patchforge.service import tracing
from patchforge.service.cli.main import app
from tests.patience import PATIENCE

if __name__ == "__main__":
    tracing.FLUSH_SECONDS = PATIENCE
    app()

"""Earlier versions, as wheels beside this file, to run beside today's: see README.md."""

from pathlib import Path

_HERE = Path(__file__).parent
WHEELS = {
    0: _HERE / "patchforge-0.1.0+86efb14-py3-none-any.whl",
    1: _HERE / "patchforge-0.1.0+3744e43-py3-none-any.whl",
}
"""By protocol: the last version without a protocol number, and a version of protocol 1."""

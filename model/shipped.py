"""Find the bundles that the package ships. This file must not import torch: the command line imports it early."""

from __future__ import annotations

from pathlib import Path

BUNDLES = Path(__file__).parent / "bundles"
"""Holds one folder per bundle."""
SHIPPED = Path("shipped")
"""Stands for that folder where a list of folders is asked for."""


def bundle_folder(bundle: Path | str) -> Path:
    """Find a bundle's folder, given the folder itself or the name of a shipped bundle.

    A folder takes precedence over a name. Anything else is returned as it is; opening it then raises the error.
    """
    folder = Path(bundle)
    if not folder.exists() and folder == Path(folder.name) and (BUNDLES / folder).is_dir():
        return BUNDLES / folder
    return folder

"""`patchforge doctor`: the first command to run on a new machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table, write_json


def doctor(
    bundle: Annotated[
        list[Path] | None, typer.Argument(help="Folders or names of bundles; default: the shipped ones.")
    ] = None,
    out: options.Json = None,
    threads: options.Threads = None,
) -> None:
    """Check that this machine draws pictures correctly, how fast it is, and what to set; exit status 1 if not."""
    from patchforge.model.device import prepare_cpu
    from patchforge.model.doctor import Check, examine
    from patchforge.model.shipped import BUNDLES
    from patchforge.model.storage.bundle import list_bundles

    prepare_cpu(threads, only_pictures=True)
    with typed_errors():
        wanted: list[Path | str] = list(bundle or [each.folder for each in list_bundles(BUNDLES)])
        checks: list[Check] = list(examine(wanted))
    marks = {True: "yes", False: "NO", None: ""}
    rows = [(each.name, each.found, marks[each.ok], each.advice) for each in checks]
    print_table("patchforge doctor", ("what", "found", "right", "advice"), rows, width=140)
    if out is not None:
        write_json(out, [asdict(each) for each in checks])
    if any(each.ok is False for each in checks):
        raise typer.Exit(1)

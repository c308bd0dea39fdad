"""`patchforge bench threads`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from patchforge.service.cli import options
from patchforge.service.cli.errors import typed_errors
from patchforge.service.cli.report import print_table, write_json, write_table

COLUMNS = "pictures", "computed by", "quiet, ms", "beside, ms", "beside ÷ quiet", "OpenMP ÷ this, quiet", "beside"


def threads(
    bundle: Annotated[Path, typer.Option(help="Bundle whose network is evaluated.")] = Path("emoji-class"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each evaluates every pack in every way.")] = 10,
    busy: Annotated[int, typer.Option(min=1, help="Number of busy processes in the second half.")] = 1,
    out: options.Json = None,
    doc: options.Doc = None,
    threads: options.Threads = None,
) -> None:
    """Measure one evaluation by one thread, by OpenMP's threads, and in parts; quiet and beside busy processes."""
    from patchforge.model.experiments.threads_bench import OPENMP, bench_threads
    from patchforge.model.openmp import usable_cores
    from patchforge.model.shipped import bundle_folder
    from patchforge.model.storage.bundle import open_bundle

    with typed_errors():
        open_bundle(bundle)  # the child processes could not report what is wrong with it
        count = threads or usable_cores()
        rows = list(bench_threads(bundle_folder(bundle), count, rounds, busy))
        before = {row.pack: row for row in rows if row.way == OPENMP}
        lines = []
        for row in rows:
            gains = before[row.pack].quiet / row.quiet, before[row.pack].busy / row.busy
            figures = f"{row.quiet:.1f}", f"{row.busy:.1f}", f"{row.busy / row.quiet:.2f}"
            lines.append([row.pack, row.way, *figures, *(f"{gain:.2f}" for gain in gains)])
        print_table(f"{bundle.name}, one evaluation, {count} threads, beside {busy} busy", COLUMNS, lines, width=110)
        if doc is not None:
            write_table(doc, f"threads, {bundle.name}", COLUMNS, lines)
        if out is not None:
            write_json(out, [asdict(row) for row in rows])

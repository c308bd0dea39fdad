"""`patchforge bench engine --slo`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from patchforge.service.cli.report import print_table, write_json, write_table

if TYPE_CHECKING:
    from patchforge.service.bench.slo import SloRow

COLUMNS = "wanted within", "policy", "load", "in time", "p50 s", "p99 s", "patch evaluations", "lowered", "PSNR dB"


def measure_slo(
    bundle: Path,
    requests: int,
    loads: Sequence[float] | None,
    seed: int,
    patch_budget: int | None,
    cpu_clock: bool,
    out: Path | None,
    doc: Path | None,
) -> None:
    """Measure answers in time and their quality, print the table, and write it where it is wanted."""
    from patchforge.model.pipeline import Pipeline
    from patchforge.service.bench.slo import LOADS, SloBench
    from patchforge.service.worker.budgets import patch_budget as profiled

    clock = time.process_time if cpu_clock else time.perf_counter
    pipeline = Pipeline.open(bundle)
    budget = patch_budget or profiled(pipeline, clock)
    report = SloBench(pipeline, requests, budget, clock, seed).run(loads or LOADS)
    name = pipeline.manifest.name
    floors = ", ".join(f"{quality} {psnr:.2f} dB" for quality, psnr in report.psnr.items())
    said = f"{name}: alone {report.alone:.3f} s, capacity {report.capacity:.1f}/s, PSNR of {floors}"
    print_table(f"Answers in time; load 1 is our capacity at fixed quality. {said}", COLUMNS, map(_cells, report.rows))
    if doc is not None:
        write_table(doc, f"slo, {name}", COLUMNS, map(_cells, report.rows))
        alone = f"{report.alone:.3f}", f"{report.capacity:.1f}", *(f"{psnr:.2f}" for psnr in report.psnr.values())
        columns = "alone s", "capacity/s", *(f"PSNR of {quality}, dB" for quality in report.psnr)
        write_table(doc, f"slo, {name}, floors", columns, [alone])
    if out is not None:
        write_json(out, {"model": name, "patch_budget": budget, "requests": requests, **asdict(report)})


def _cells(row: SloRow) -> list[str]:
    times = f"{row.p50:.2f}", f"{row.p99:.2f}"
    work = f"{row.patches:.0f}", f"{row.lowered:.0%}", f"{row.psnr:.2f}"
    return [f"{row.within:g}×", row.policy, f"{row.load:.2f}", f"{row.in_time:.1%}", *times, *work]

"""Plots of what ``patchforge bench`` measured; matplotlib comes with the ``bench`` extra."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from model.evaluation.forward_bench import ForwardRow
    from model.evaluation.frechet import Interval
    from model.evaluation.sampler_bench import Row
    from service.worker.engine_bench import EngineRow


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes side by side.

    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequest("needs matplotlib: pip install 'patchforge[bench]'", field="plot") from error
    figure = Figure(figsize=(6.5 * panels, 4.2), layout="constrained")
    axes: Any = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def plot_forward(rows: list[ForwardRow], path: Path) -> None:
    """Seconds of each way to evaluate one picture, with the floor its FLOPs set; one panel a size."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    figure, panels = new_figure(len(sizes))
    for axes, size in zip(panels, sizes, strict=True):
        some = [row for row in rows if row.size == size][::-1]
        positions = range(len(some))
        bars = axes.barh(positions, [row.seconds for row in some], color="#4c78a8", label="measured")
        axes.barh(positions, [row.floor_seconds for row in some], color="#9ecae9", height=0.35, label="FLOPs at peak")
        axes.bar_label(bars, [f" {row.ratio:.2f}×" for row in some])
        axes.set_yticks(positions, [row.case for row in some])
        axes.set(title=f"{size}: × faster than dense as the paper", xlabel="seconds an evaluation")
        axes.margins(x=0.15)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(path)


def plot_samplers(rows: dict[str, list[Row]], path: Path) -> None:
    """PSNR, and quality where it was measured, over the patch evaluations of a picture; one colour a family."""
    measured = any(row.quality for some in rows.values() for row in some)
    figure, panels = new_figure(3 if measured else 1)
    for family, some in rows.items():
        costs = [row.patch_evaluations for row in some]
        style: dict[str, Any] = {"label": family, "alpha": 0.8, "zorder": 4 if family == "adaptive" else 3}
        panels[0].scatter(costs, [row.psnr for row in some], **style)
        if measured:
            for axes, figures in zip(panels[1:], _seen(some), strict=True):
                low = [each.value - each.low for each in figures]
                high = [each.high - each.value for each in figures]
                axes.errorbar(costs, [each.value for each in figures], [low, high], fmt="o", **style)
    names = ["PSNR against a fine solution, dB", "Fréchet distance", "prompt among the first five"]
    for axes, name in zip(panels, names[: len(panels)], strict=True):
        axes.set(xscale="log", xlabel="patch evaluations a picture, both guidance branches", ylabel=name)
    panels[0].legend()
    figure.savefig(path)


def _seen(rows: list[Row]) -> tuple[list[Interval], list[Interval]]:
    found = [row.quality for row in rows if row.quality is not None]
    return [each.distance for each in found], [each.top5 for each in found]


def plot_engine(rows: list[EngineRow], path: Path) -> None:
    """p95 latency and time to first preview over the rate offered, one line a policy."""
    figure, panels = new_figure(2)
    shown = [row for row in rows if math.isfinite(row.offered)]
    for policy in dict.fromkeys(row.policy for row in shown):
        some = [row for row in shown if row.policy == policy]
        rates = [row.offered for row in some]
        panels[0].plot(rates, [row.p95 for row in some], marker="o", label=policy)
        panels[1].plot(rates, [row.preview_p50 for row in some], marker="o")
    panels[0].set(title="p95 latency", xlabel="requests offered a second", ylabel="seconds", yscale="log")
    panels[1].set(title="median time to first preview", xlabel="requests offered a second", yscale="log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(path)

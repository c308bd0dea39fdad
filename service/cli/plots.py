"""Plots of what `patchforge bench` and `patchforge eval` measured; needs the `bench` extra (matplotlib)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchforge.service.errors import InvalidRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from patchforge.model.evaluation.evaluate import Report
    from patchforge.model.evaluation.frechet import Interval
    from patchforge.model.experiments.budget_curve import BudgetPoint
    from patchforge.model.experiments.forward_bench import ForwardRow
    from patchforge.model.experiments.sampler_bench import Row
    from patchforge.service.bench.engine import EngineRow

COLOURS = {"made": "#4c78a8", "reconstructed": "#9ecae9", "real": "#f58518"}


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes side by side.

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
    """Seconds per evaluation of one picture, beside the minimum that its FLOPs allow; one panel per size."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    figure, panels = new_figure(len(sizes))
    for axes, size in zip(panels, sizes, strict=True):
        some = [row for row in rows if row.size == size][::-1]
        positions = range(len(some))
        bars = axes.barh(positions, [row.seconds for row in some], color="#4c78a8", label="measured")
        axes.barh(positions, [row.floor_seconds for row in some], color="#9ecae9", height=0.35, label="FLOPs at peak")
        axes.bar_label(bars, [f" {row.ratio:.2f}×" for row in some])
        axes.set_yticks(positions, [row.case for row in some])
        axes.set(title=f"{size}: × faster than dense as the paper", xlabel="seconds per evaluation")
        axes.margins(x=0.15)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(path)


def plot_samplers(rows: dict[str, list[Row]], path: Path) -> None:
    """PSNR, and quality if it was measured, over patch evaluations per picture; one colour per family."""
    measured = any(row.quality for some in rows.values() for row in some)
    figure, panels = new_figure(3 if measured else 1)
    for family, some in rows.items():
        costs = [row.patch_evaluations for row in some]
        style: dict[str, Any] = {"label": family, "alpha": 0.8, "zorder": 4 if family == "adaptive" else 3}
        panels[0].scatter(costs, [row.psnr for row in some], **style)
        if measured:
            for axes, figures in zip(panels[1:], _quality_of(some), strict=True):
                low = [figure.value - figure.low for figure in figures]
                high = [figure.high - figure.value for figure in figures]
                axes.errorbar(costs, [figure.value for figure in figures], [low, high], fmt="o", **style)
    names = ["PSNR against a fine solution, dB", "cosine to the real picture", "sharpness, real = 1"]
    for axes, name in zip(panels, names[: len(panels)], strict=True):
        axes.set(xscale="log", xlabel="patch evaluations per picture, both guidance branches", ylabel=name)
    panels[0].legend()
    figure.savefig(path)


def plot_budgets(name: str, points: list[BudgetPoint], path: Path) -> None:
    """What a budget costs in each figure: the paired difference to pictures without one, over the share spent."""
    shown = [each for each in ("cosine", "sharpness", "distance") if each in points[0].figures]
    figure, panels = new_figure(len(shown))
    whole, *rest = points
    shares = [point.spent / whole.spent for point in rest]
    for axes, each in zip(panels, shown, strict=True):
        found = [point.differences[each] for point in rest]
        low, high = ([abs(side(one) - one.value) for one in found] for side in (lambda i: i.low, lambda i: i.high))
        axes.errorbar(shares, [one.value for one in found], [low, high], fmt="o-", color=COLOURS["made"])
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=f"{name}: {each}", xlabel="patch evaluations, as a share", ylabel="− without a budget")
    figure.savefig(path)


def _quality_of(rows: list[Row]) -> tuple[list[Interval], list[Interval]]:
    found = [row.quality.figures for row in rows if row.quality is not None]
    return [figures["cosine"] for figures in found], [figures["sharpness"] for figures in found]


def plot_engine(rows: list[EngineRow], path: Path) -> None:
    """p95 latency and time to first preview over the offered rate; one line per policy."""
    figure, panels = new_figure(2)
    shown = [row for row in rows if math.isfinite(row.offered)]
    for policy in dict.fromkeys(row.policy for row in shown):
        some = [row for row in shown if row.policy == policy]
        rates = [row.offered for row in some]
        panels[0].plot(rates, [row.p95 for row in some], marker="o", label=policy)
        panels[1].plot(rates, [row.preview_p50 for row in some], marker="o")
    panels[0].set(title="p95 latency", xlabel="offered requests per second", ylabel="seconds", yscale="log")
    panels[1].set(title="median time to first preview", xlabel="offered requests per second", yscale="log")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(path)


def plot_measures(report: Report, path: Path) -> None:
    """The Fréchet distances and all shares, beside what real pictures reach."""
    figure, (left, right) = new_figure(2)
    distances = [name for name in report.measures if name.startswith("frechet") or name.endswith("_distance")]
    shares = [name for name in report.measures if name not in distances]
    figure.set_figheight(max(4.2, 0.4 * len(shares)))
    for axes, names in ((left, distances), (right, shares)):
        for offset, (of, colour) in enumerate(COLOURS.items()):
            for row, name in enumerate(names):
                if (value := getattr(report.measures[name], of)) is None:
                    continue
                error = [[value.value - value.low], [value.high - value.value]]
                label = of if row == 0 else None
                axes.barh(row + 0.27 * (offset - 1), value.value, 0.25, xerr=error, color=colour, label=label)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
    left.set(title="lower is better", xlabel="distance in the judge's features")
    right.set(title="higher is better", xlabel="share")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path)


def plot_calibration(report: Report, path: Path) -> None:
    """Left: how well predicted variance ranks errors. Right: predicted variance against measured squared error."""
    figure, (left, right) = new_figure(2)
    for (name, found), colour in zip(report.calibration.items(), (COLOURS["made"], COLOURS["real"]), strict=False):
        middle = [(row.low + row.high) / 2 for row in found.times]
        values = [row.spearman for row in found.times]
        left.plot(middle, [value.value for value in values], "o-", color=colour, label=f"{name}, all patches")
        left.fill_between(middle, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.2)
        within = [(at, row.within.value) for at, row in zip(middle, found.times, strict=True) if row.within]
        left.plot(*zip(*within, strict=True), "o--", color=colour, alpha=0.6, label=f"{name}, within a picture")
        bins = found.reliability
        measured = [b.measured for b in bins]
        error = [[m.value - m.low for m in measured], [m.high - m.value for m in measured]]
        predicted = [b.predicted for b in bins]
        right.errorbar(predicted, [m.value for m in measured], yerr=error, fmt="o-", color=colour, label=name)
    ends = [bound for bound in right.get_xlim() if bound > 0] or [0.01]
    right.axline((ends[-1], ends[-1]), slope=1, color="grey", lw=1, ls=":")
    right.set(xscale="log", yscale="log", title="reliability")
    right.set(xlabel="predicted variance", ylabel="measured squared error")
    left.set(xlabel="timestep", ylabel="rank correlation with the error", ylim=(None, 1), title="does it rank errors?")
    for axes in (left, right):
        axes.legend(fontsize="small")
    figure.savefig(path)

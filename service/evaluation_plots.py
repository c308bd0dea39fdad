"""Plots of what ``patchforge eval`` and ``patchforge bench claims`` measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from service.bench_plots import new_figure

if TYPE_CHECKING:
    from model.evaluation.evaluate import Report

COLOURS = {"made": "#4c78a8", "reconstructed": "#9ecae9", "real": "#f58518"}


def plot_measures(report: Report, path: Path) -> None:
    """The Fréchet distance, and every share, each with what real pictures reach."""
    figure, (left, right) = new_figure(2)
    distances = [name for name in report.measures if name.startswith("frechet")]
    shares = [name for name in report.measures if name not in distances]
    figure.set_figheight(max(4.2, 0.4 * len(shares)))
    for axes, names in ((left, distances), (right, shares)):
        for offset, (of, colour) in enumerate(COLOURS.items()):
            for row, name in enumerate(names):
                if (each := getattr(report.measures[name], of)) is None:
                    continue
                error = [[each.value - each.low], [each.high - each.value]]
                label = of if row == 0 else None
                axes.barh(row + 0.27 * (offset - 1), each.value, 0.25, xerr=error, color=colour, label=label)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
    left.set(title="lower is better", xlabel="distance in the judge's features")
    right.set(title="higher is better", xlabel="share")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path)


def plot_calibration(report: Report, path: Path) -> None:
    """Left, how well predicted variance ranks errors; right, predicted variance against measured squared error."""
    figure, (left, right) = new_figure(2)
    for (name, each), colour in zip(report.calibration.items(), (COLOURS["made"], COLOURS["real"]), strict=False):
        middle = [(row.low + row.high) / 2 for row in each.times]
        values = [row.spearman for row in each.times]
        left.plot(middle, [value.value for value in values], "o-", color=colour, label=f"{name}, all patches")
        left.fill_between(middle, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.2)
        within = [(at, row.within.value) for at, row in zip(middle, each.times, strict=True) if row.within]
        left.plot(*zip(*within, strict=True), "o--", color=colour, alpha=0.6, label=f"{name}, within a picture")
        bins = each.reliability
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

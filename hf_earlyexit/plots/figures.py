"""The figures of cards and reports, each from plain numbers to one SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from ..metrics import Reliability
from .style import COLOURS, SERIES, calm, figure, legend_columns, number_layers, to_svg

DASHES = ((0, (5, 1.2)), (0, (2, 1)), (0, (7, 1.2, 1.5, 1.2)))
SHAPES = ("o", "s", "D", "^", "v", "P", "X")
PARETO_WIDTH = 6.0  # inches
SHARES_WIDTH = 4.4
FEWEST = 0.01  # share of rows below which the quality of leavers is not drawn


class PlotLine(NamedTuple):
    """Settings of one policy, or of several that do the same: mean layers and quality of each, in order of layers.

    `look` is "dots" for the yardstick, "bold" for the policy the text is about, "plain" for all others. `error`, a standard
    error for each setting, is drawn as a band around a bold line.
    """

    name: str
    layers: Sequence[float]
    quality: Sequence[float]
    look: str = "plain"
    error: Sequence[float] | None = None


class Mark(NamedTuple):
    """One setting to point at, with the standard error of its quality if that is known."""

    name: str
    layers: float
    quality: float
    error: float | None = None


def pareto_svg(lines: Sequence[PlotLine], marks: Sequence[Mark], full: Mark, measure: str) -> str:
    """Quality against mean layers. All names are in the legend below, so that none covers a curve or another name.

    Args:
        lines: one for each policy.
        marks: settings to point at.
        full: the full model.
        measure: what quality is, for the axis.
    """
    names = [full.name, *(line.name for line in lines), *(mark.name for mark in marks)]
    columns = legend_columns(names, PARETO_WIDTH)
    with figure(PARETO_WIDTH, 3.5 + 0.2 * math.ceil(len(names) / columns)) as (drawing, axes):
        calm(axes, xlabel="mean layers per row", ylabel=measure)
        axes.axhline(full.quality, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (1, 2)), label=full.name)
        for number, line in enumerate(lines):
            colour = SERIES[number % len(SERIES)]
            looks: dict[str, dict[str, Any]] = {
                "dots": {"color": COLOURS["muted"], "marker": "o", "markersize": 3.5, "linestyle": "none"},
                "bold": {"color": colour, "linewidth": 2.0, "zorder": 4},
                "plain": {"color": colour, "linewidth": 1.3, "linestyle": DASHES[number % len(DASHES)]},
            }
            axes.plot(line.layers, line.quality, label=line.name, **looks[line.look])
            if line.error is not None and line.look == "bold":
                low, high = zip(*((q - e, q + e) for q, e in zip(line.quality, line.error, strict=True)), strict=True)
                axes.fill_between(line.layers, low, high, color=colour, alpha=0.16, linewidth=0)
        for mark, shape in zip(marks, cycle(SHAPES)):
            axes.errorbar(
                [mark.layers],
                [mark.quality],
                yerr=None if mark.error is None else [mark.error],
                fmt=shape,
                markersize=6.5,
                color=COLOURS["ink"],
                elinewidth=1.0,
                capsize=3,
                zorder=5,
                label=mark.name,
            )
        axes.set_xlim(0, full.layers * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        drawing.legend(loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.2)
        return to_svg(drawing, f"{measure} against mean layers per row for {', '.join(line.name for line in lines)}")


def exit_shares_svg(
    shares: Mapping[str, Sequence[float]], layers: Sequence[int], what: str = "share of rows leaving"
) -> str:
    """Share of rows at each layer: those that leave after it, or whatever else is counted by layer.

    Args:
        shares: by name, one share in `[0, 1]` for each layer.
        layers: layers with an exit.
        what: the shares, in words.
    """
    columns = legend_columns(list(shares), SHARES_WIDTH)
    lines = math.ceil(len(shares) / columns) if len(shares) > 1 else 0
    with figure(SHARES_WIDTH, 2.4 + 0.2 * lines) as (drawing, axes):
        calm(axes, xlabel="layer", ylabel=what)
        width = 0.8 / len(shares)
        for number, (name, heights) in enumerate(shares.items()):
            places = [index - 0.4 + width * (number + 0.5) for index in range(len(layers))]
            axes.bar(
                places, [100 * height for height in heights], width * 0.92, color=SERIES[number % len(SERIES)], label=name
            )
        number_layers(axes, layers)
        axes.yaxis.set_major_formatter("{x:.0f}%")
        if len(shares) > 1:
            drawing.legend(loc="outside lower center", ncols=columns, handlelength=1.0)
        return to_svg(drawing, f"{what.capitalize()}, by layer")


def exit_quality_svg(
    layers: Sequence[int],
    everyone: Sequence[float],
    leavers: Sequence[float | None],
    shares: Sequence[float],
    measure: str,
    errors: Sequence[float] | None = None,
) -> str:
    """Quality of each exit on all rows and on those that leave there.

    Args:
        layers: layers with an exit.
        everyone: quality on all rows, one for each exit.
        leavers: quality on the rows leaving there; `None` where nobody leaves.
        shares: share of rows leaving there, the size of the mark; where it is below `FEWEST` there is none, since a few
            rows say little and stretch the axis.
        measure: what quality is, for the axis.
        errors: standard errors of `everyone`, drawn as bars.
    """
    with figure(4.4, 2.8) as (drawing, axes):
        calm(axes, xlabel="layer", ylabel=measure)
        places = range(len(layers))
        axes.errorbar(
            places,
            everyone,
            yerr=errors,
            color=SERIES[0],
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
            marker="o",
            markersize=3.5,
            label="on all rows",
        )
        drawn = [
            (place, value, 15 + 150 * share)
            for place, value, share in zip(places, leavers, shares, strict=True)
            if value is not None and share >= FEWEST
        ]
        if drawn:
            where, values, sizes = zip(*drawn, strict=True)
            axes.scatter(
                where,
                values,
                sizes,
                color=SERIES[1],
                marker="D",
                linewidths=0,
                zorder=3,
                label="on the rows that leave here",
            )
        number_layers(axes, layers)
        drawing.legend(loc="outside lower center", ncols=2, handlelength=1.5, markerscale=0.8)
        return to_svg(drawing, f"{measure} of each exit on all rows and on the rows that leave there")


def reliability_svg(measured: Reliability, layer: int) -> str:
    """Confidence against accuracy of one exit, a dot as large as its share of the rows; the diagonal is honest."""
    with figure(1.75, 1.75) as (drawing, axes):
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.7, linestyle=(0, (2, 2)))
        axes.plot(measured.confidence, measured.accuracy, color=SERIES[0], linewidth=1.0)
        sizes = [6 + 90 * share for share in measured.share]
        axes.scatter(measured.confidence, measured.accuracy, sizes, color=SERIES[0], linewidths=0, zorder=3)
        axes.set(xlim=(0, 1.04), ylim=(0, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
        axes.set_xticklabels(["0", ".5", "1"])
        axes.set_yticklabels(["0", ".5", "1"])
        return to_svg(drawing, f"Reliability of the exit after layer {layer}: expected calibration error {measured.ece:.3f}")

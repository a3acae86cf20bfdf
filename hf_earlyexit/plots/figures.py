"""The figures of cards and reports, each from plain numbers to one SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from ..metrics import Reliability
from .style import COLOURS, SERIES, calm, figure, to_svg

DASHES = ((0, (5, 1.2)), (0, (2, 1)), (0, (7, 1.2, 1.5, 1.2)))
FEWEST = 0.01  # share of rows below which the quality of leavers is not drawn


class Line(NamedTuple):
    """Settings of one policy, or of several that do the same: mean layers and quality of each, in order of layers.

    `look` is "dots" for the yardstick, "bold" for the policy the text is about, "plain" for all others.
    """

    name: str
    layers: Sequence[float]
    quality: Sequence[float]
    look: str = "plain"


class Mark(NamedTuple):
    """One setting to point at."""

    name: str
    layers: float
    quality: float


def pareto_svg(lines: Sequence[Line], marks: Sequence[Mark], full: Mark, measure: str) -> str:
    """Quality against mean layers.

    Args:
        lines: one for each policy.
        marks: settings to name in the plot.
        full: the full model.
        measure: what quality is, for the axis.
    """
    with figure(4.4, 3.9) as (drawing, axes):
        calm(axes, xlabel="mean layers per row", ylabel=measure)
        axes.axhline(full.quality, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            full.name, (full.layers, full.quality), (0, 4), textcoords="offset points", ha="right", color=COLOURS["muted"]
        )
        for number, line in enumerate(lines):
            looks: dict[str, dict[str, Any]] = {
                "dots": {"color": COLOURS["muted"], "marker": "o", "markersize": 3.5, "linestyle": "none"},
                "bold": {"color": SERIES[number % len(SERIES)], "linewidth": 2.0, "zorder": 4},
                "plain": {
                    "color": SERIES[number % len(SERIES)],
                    "linewidth": 1.3,
                    "linestyle": DASHES[number % len(DASHES)],
                },
            }
            axes.plot(line.layers, line.quality, label=line.name, **looks[line.look])
        for number, mark in enumerate(marks):
            place, side = ((7, -13), "left") if number % 2 == 0 else ((-7, 6), "right")  # neighbours do not cover each other
            axes.plot([mark.layers], [mark.quality], "o", markersize=6, color=COLOURS["ink"], zorder=5)
            axes.annotate(
                mark.name,
                (mark.layers, mark.quality),
                place,
                textcoords="offset points",
                ha=side,
                fontweight="bold",
                zorder=6,
                bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )
        axes.set_xlim(0, full.layers * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + 0.06 * (top - bottom))
        if len(lines) > 1:
            drawing.legend(loc="outside lower center", ncols=2, handlelength=2.2, columnspacing=1.2)
        names = ", ".join(line.name for line in lines)
        return to_svg(drawing, f"{measure} against mean layers per row for {names}")


def exit_shares_svg(
    shares: Mapping[str, Sequence[float]], layers: Sequence[int], what: str = "share of rows leaving"
) -> str:
    """Share of rows at each layer: those that leave after it, or whatever else is counted by layer.

    Args:
        shares: by name, one share in `[0, 1]` for each layer.
        layers: layers with an exit.
        what: the shares, in words.
    """
    with figure(4.4, 2.5) as (drawing, axes):
        calm(axes, xlabel="layer", ylabel=what)
        width = 0.8 / len(shares)
        for number, (name, heights) in enumerate(shares.items()):
            places = [index - 0.4 + width * (number + 0.5) for index in range(len(layers))]
            axes.bar(
                places, [100 * height for height in heights], width * 0.92, color=SERIES[number % len(SERIES)], label=name
            )
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.yaxis.set_major_formatter("{x:.0f}%")
        if len(shares) > 1:
            drawing.legend(loc="outside lower center", ncols=3, handlelength=1.0)
        return to_svg(drawing, f"{what.capitalize()}, by layer")


def exit_quality_svg(
    layers: Sequence[int],
    everyone: Sequence[float],
    leavers: Sequence[float | None],
    shares: Sequence[float],
    measure: str,
) -> str:
    """Quality of each exit on all rows and on those that leave there.

    Args:
        layers: layers with an exit.
        everyone: quality on all rows, one for each exit.
        leavers: quality on the rows leaving there; `None` where nobody leaves.
        shares: share of rows leaving there, the size of the mark; where it is below `FEWEST` there is none, since a few
            rows say little and stretch the axis.
        measure: what quality is, for the axis.
    """
    with figure(4.4, 2.8) as (drawing, axes):
        calm(axes, xlabel="layer", ylabel=measure)
        places = range(len(layers))
        axes.plot(places, everyone, color=SERIES[0], linewidth=1.4, marker="o", markersize=3.5, label="on all rows")
        there = [
            (place, value, 15 + 150 * share)
            for place, value, share in zip(places, leavers, shares, strict=True)
            if value is not None and share >= FEWEST
        ]
        if there:
            where, values, sizes = zip(*there, strict=True)
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
        axes.set_xticks(places, [str(layer) for layer in layers])
        drawing.legend(loc="outside lower center", ncols=2, handlelength=1.5, markerscale=0.8)
        return to_svg(drawing, f"{measure} of each exit on all rows and on the rows that leave there")


def reliability_svg(found: Reliability, layer: int) -> str:
    """Confidence against accuracy of one exit, a dot as large as its share of the rows; the diagonal is honest."""
    with figure(1.75, 1.75) as (drawing, axes):
        axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=0.7, linestyle=(0, (2, 2)))
        axes.plot(found.confidence, found.accuracy, color=SERIES[0], linewidth=1.0)
        sizes = [6 + 90 * share for share in found.share]
        axes.scatter(found.confidence, found.accuracy, sizes, color=SERIES[0], linewidths=0, zorder=3)
        axes.set(xlim=(0, 1.04), ylim=(0, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
        axes.set_xticklabels(["0", ".5", "1"])
        axes.set_yticklabels(["0", ".5", "1"])
        return to_svg(drawing, f"Reliability of the exit after layer {layer}: expected calibration error {found.ece:.3f}")

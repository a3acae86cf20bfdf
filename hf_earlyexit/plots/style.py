"""One look for all figures: few lines, real text, colours that a page can exchange for its own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Every colour once, so that a page can find it in the SVG and put its own in its place.
COLOURS = {
    "paper": "#fefefc",
    "ink": "#1f2730",
    "muted": "#66707b",
    "grid": "#e2e6ea",
    "series-1": "#0f766e",
    "series-2": "#c2570c",
    "series-3": "#2a63b0",
    "series-4": "#9c2f7f",
    "series-5": "#63720f",
    "series-6": "#0b8bb0",
    "series-7": "#b4273d",
    "series-8": "#6d55c4",
}
SERIES = tuple(colour for name, colour in COLOURS.items() if name.startswith("series"))
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_earlyexit",  # the same figure gives the same bytes
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": COLOURS["paper"],
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "path.simplify_threshold": 0.5,
}
MOST_NUMBERS = 12  # below an axis, so that none covers another
ID = re.compile(r' id="([^"]*)"')


@contextmanager
def figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `width` by `height` inches with one pair of axes, drawn in the house style and no global state."""
    with matplotlib.rc_context(SETTINGS):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(drawing)
        yield drawing, drawing.add_subplot()


def to_svg(drawing: Figure, description: str) -> str:
    """The figure as one `<svg>` element with real text and a size given by its view box alone.

    Args:
        drawing: from `figure`, inside its block.
        description: what the figure shows, for readers who cannot see it.
    """
    file = io.StringIO()
    drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = ID.sub(lambda match: match[0] if match[1] in used else "", text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "matplotlib always writes a view box"
    body = text[text.index("<defs") : text.rindex("</svg>")]
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = escape(description, quote=True)
    return f'<svg {links} viewBox="{box[1]}" role="img" aria-label="{label}">\n{body}</svg>\n'


def with_page_colours(svg: str) -> str:
    """The same figure in the colours of the page around it: each becomes the CSS variable of its name."""
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def calm(axes: Axes, **labels: Any) -> None:
    """A light grid across, and labels."""
    axes.grid(visible=True, axis="y")
    axes.set(**labels)


def legend_columns(names: Sequence[str], width: float) -> int:
    """How many columns of a legend with these names fit into a figure of `width` inches, at least 1.

    Letters are taken as wide as the widest common font draws them, since the reader's font is not known.
    """
    widest = 0.09 * max(len(name) for name in names) + 0.5  # inches: the letters, the handle and the gap
    return max(1, min(len(names), int(width / widest)))


def number_layers(axes: Axes, layers: Sequence[int]) -> None:
    """The layers' numbers below their places 0, 1, 2, ...; of many only every second or third, the last one always."""
    places = range(len(layers))[:: -math.ceil(len(layers) / MOST_NUMBERS)]
    axes.set_xticks(places, [str(layers[place]) for place in places])

"""Figures are well-formed, repeatable, small, and keep hostile names as text."""

import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.text import Text

from hf_earlyexit.metrics import Reliability
from hf_earlyexit.plots.figures import Mark, PlotLine, exit_quality_svg, exit_shares_svg, pareto_svg, reliability_svg
from hf_earlyexit.plots.style import COLOURS, SERIES, with_page_colours

HOSTILE = '$\\frac{x}$ <script>alert(1)</script> "&'


def figures():
    lines = [PlotLine(HOSTILE, (1, 2, 3), (0.5, 0.7, 0.8), "bold"), PlotLine("static", (1, 3), (0.4, 0.8), "dots")]
    yield pareto_svg(lines, [Mark("a", 2, 0.7)], Mark("full model", 3, 0.8), "accuracy")
    yield exit_shares_svg({HOSTILE: (0.25, 0.75), "b": (1.0, 0.0)}, (2, 4))
    yield exit_quality_svg((2, 4), (0.5, 0.9), (None, 0.9), (0.0, 1.0), "accuracy")
    yield reliability_svg(Reliability((0.6, 0.9), (0.5, 1.0), (0.5, 0.5), 0.1), 4)


@pytest.fixture
def drawn(monkeypatch):
    """The drawings behind the figures, as matplotlib lays them out."""
    drawings = []

    def keep(drawing, description):
        FigureCanvasAgg(drawing).draw()
        drawings.append(drawing)
        return ""

    monkeypatch.setattr("hf_earlyexit.plots.figures.to_svg", keep)
    return drawings


def texts_of(drawing):
    """Every text that is drawn, with its place."""
    axes = drawing.axes[0]
    unseen = [  # ticks beyond the ends of an axis are kept, but not drawn
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    drawn = [text for text in drawing.findobj(Text) if text.get_text().strip() and text not in unseen]
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn]
    return [(name, box) for name, box in boxes if box.width > 1]  # ticks that were never laid out have no extent


CROWDED = ["confidence, entropy, margin", "beem-calibrated", "reward", "balanced", "fast", "a name of twenty-eight signs"]


def test_no_text_covers_another_or_a_curve(drawn):
    places = [(4 + 0.01 * number, 0.9 + 0.0001 * number) for number in range(len(CROWDED))]  # as close as can be
    lines = [PlotLine(name, (1, 4, 12), (0.6, 0.9, 0.91), "bold", (0.01, 0.01, 0.0)) for name in CROWDED]
    pareto_svg(lines, [Mark(name, *place, 0.01) for name, place in zip(CROWDED, places, strict=True)],
               Mark("full model", 12, 0.91), "accuracy")  # fmt: skip
    exit_shares_svg({name: [1 / 12] * 12 for name in CROWDED}, range(1, 13))
    exit_quality_svg(range(1, 25), [0.9] * 24, [0.8] * 24, [1 / 24] * 24, "share of right labels", [0.01] * 24)
    for drawing in drawn:
        texts, plot = texts_of(drawing), drawing.axes[0].get_window_extent()
        for (name, box), (other, neighbour) in combinations(texts, 2):
            assert not box.padded(-0.5).overlaps(neighbour.padded(-0.5)), f"{name!r} covers {other!r}"
        for name, box in texts:
            assert not box.padded(-0.5).overlaps(plot), f"{name!r} stands on the curves"
            assert box.x0 > -0.5, f"{name!r} is cut off"
            assert box.x1 < drawing.bbox.x1 + 0.5, f"{name!r} is cut off"
        shown = [text for text, _ in texts]
        assert all(shown.count(name) >= 1 for name in CROWDED) or drawing is drawn[2]


def test_the_bold_line_has_a_band_of_its_errors(drawn):
    line = PlotLine("a", (1, 2, 3), (0.5, 0.7, 0.8), "bold", (0.1, 0.05, 0.0))
    pareto_svg([line, line._replace(name="b", look="plain")], [Mark("m", 2, 0.7, 0.05)], Mark("full", 3, 0.8), "accuracy")
    (band,) = [part for part in drawn[0].axes[0].collections if isinstance(part, PolyCollection)]
    corners = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(1, 0.4), (1, 0.6), (2, 0.65), (2, 0.75), (3, 0.8)}
    (bar,) = [part for part in drawn[0].axes[0].collections if isinstance(part, LineCollection)]
    assert bar.get_segments()[0].round(6).tolist() == [[2, 0.65], [2, 0.75]]


def test_every_figure_parses_and_is_small():
    for svg in figures():
        root = ElementTree.fromstring(svg)
        assert root.get("viewBox")
        assert root.get("role") == "img"
        assert root.get("width") is None
        assert len(svg) < 40_000
        assert not [node for node in root.iter() if node.tag.endswith("script")]


def test_names_stay_text():
    for svg in list(figures())[:2]:
        texts = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
        assert HOSTILE in [text.strip() for text in texts]


def test_the_same_numbers_give_the_same_bytes():
    assert list(figures()) == list(figures())


def test_ids_are_kept_only_where_they_are_used():
    for svg in figures():
        for element in ElementTree.fromstring(svg).iter():
            if name := element.get("id"):
                assert f"#{name}" in svg


def test_a_page_can_put_its_own_colours_in():
    for svg in figures():
        themed = with_page_colours(svg)
        assert "var(--ink)" in themed or "var(--muted)" in themed
        assert not any(colour in themed for colour in COLOURS.values())


def test_few_leavers_are_not_drawn():
    def drawn(share):
        return SERIES[1] in exit_quality_svg((2, 4), (0.5, 0.9), (0.4, None), (share, 1 - share), "accuracy")

    assert drawn(0.5)
    assert not drawn(0.005)


def test_nobody_leaving_at_all_is_drawn_too():
    ElementTree.fromstring(exit_quality_svg((2, 4), (0.5, 0.9), (None, None), (0.0, 0.0), "accuracy"))

"""Figures are well-formed, repeatable, small, and keep hostile names as text."""

import xml.etree.ElementTree as ElementTree

from hf_earlyexit.metrics import Reliability
from hf_earlyexit.plots.figures import Line, Mark, exit_quality_svg, exit_shares_svg, pareto_svg, reliability_svg
from hf_earlyexit.plots.style import COLOURS, SERIES, with_page_colours

HOSTILE = '$\\frac{x}$ <script>alert(1)</script> "&'


def figures():
    lines = [Line(HOSTILE, (1, 2, 3), (0.5, 0.7, 0.8), "bold"), Line("static", (1, 3), (0.4, 0.8), "dots")]
    yield pareto_svg(lines, [Mark("a", 2, 0.7)], Mark("full model", 3, 0.8), "accuracy")
    yield exit_shares_svg({HOSTILE: (0.25, 0.75), "b": (1.0, 0.0)}, (2, 4))
    yield exit_quality_svg((2, 4), (0.5, 0.9), (None, 0.9), (0.0, 1.0), "accuracy")
    yield reliability_svg(Reliability((0.6, 0.9), (0.5, 1.0), (0.5, 0.5), 0.1), 4)


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

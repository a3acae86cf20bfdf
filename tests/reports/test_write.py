"""The page: one file, true to its data, closed to hostile texts, and no wider than a phone."""

import base64
import dataclasses
import io
import re

import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_earlyexit.reports.write import write_report
from tests.reports.pages import HOSTILE, Page, browser_widths
from tests.samples import learned_trace

NAMES = ["<b>a</b>", "b|c", "d" * 120]


@pytest.fixture(scope="module")
def trace():
    return learned_trace(rows=600, exits=12)


@pytest.fixture
def few(monkeypatch):
    """Two rules are compared instead of all: for parts of the page that do not depend on how many there are."""
    monkeypatch.setattr(POLICIES, "names", lambda: ["confidence", "static"])


@pytest.fixture(scope="module")
def written(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    texts = [f"{HOSTILE} row {row}" for row in range(trace.num_rows)]
    comparison = write_report(trace, path, label_names=NAMES, texts=texts, title=HOSTILE, max_drop=0.05)
    return path, comparison


def test_the_file_needs_nothing_else_and_runs_nothing(written):
    page = Page(written[0].read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", written[0].read_text())
    assert written[0].stat().st_size < 400_000


def test_hostile_texts_are_shown_as_they_are(written):
    text = "".join(Page(written[0].read_text(encoding="utf-8")).text)
    assert '<script>alert("x")</script>' in text
    assert "{{ 7 * 7 }}" in text
    assert "<b>a</b>" in text


def test_every_number_of_the_table_is_that_of_the_data(written):
    path, comparison = written
    rows = {row[0]: row[1:] for row in Page(path.read_text(encoding="utf-8")).rows if row}
    for name, one in comparison.contenders.items():
        judged = one.judged
        assert rows[name] == [
            f"{judged.quality:.4f}",
            f"{judged.quality - judged.full_quality:+.4f}",
            f"{judged.standard_error:.4f}",
            f"{judged.mean_layers:.2f}",
            f"{judged.layer_speed_up:.2f}x",
        ]
    for exit_ in comparison.best.judged.exits:
        assert rows[str(exit_.layer)][1:3] == [f"{100 * exit_.share:.1f}%", f"{exit_.quality:.4f}"]


def test_the_halves_are_told(written):
    text = " ".join("".join(Page(written[0].read_text(encoding="utf-8")).text).split())
    assert "thresholds from 300 rows" in text
    assert "from 300 other rows" in text
    assert all(name in text for name in POLICIES.names())


@pytest.mark.usefixtures("few")
def test_a_served_policy_is_judged_instead_of_the_best(trace, tmp_path):
    policy = ee.policies.StaticPolicy.at(2, 12)
    write_report(trace, tmp_path / "r.html", policy=policy)
    text = " ".join("".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).text).split())
    assert "With static, as served, 100% of the rows left before the last layer; a row took 3.00 of 12 layers" in text
    assert "its figures flatter it" in text


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_other_problems_get_a_page_without_reliability(problem, tmp_path):
    write_report(learned_trace(rows=200, problem_type=problem), tmp_path / "r.html", max_drop=0.2)
    assert "this one does not" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_does_not_fit_is_refused(trace, tmp_path):
    with pytest.raises(DataError, match="2 texts for a trace of 600"):
        write_report(trace, tmp_path / "r.html", texts=["a", "b"])
    with pytest.raises(DataError, match="2 pictures for a trace of 600"):
        write_report(trace, tmp_path / "r.html", pictures=["a", "b"])
    with pytest.raises(DataError, match="2 label names for 3 classes"):
        write_report(trace, tmp_path / "r.html", label_names=["a", "b"])
    with pytest.raises(DataError, match="policy has 4 exits, the trace 12"):
        write_report(trace, tmp_path / "r.html", policy=ee.policies.StaticPolicy.at(1, 4))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_nothing_overflows_in_a_real_browser(width, written, tmp_path):
    html = written[0].read_text(encoding="utf-8")
    assert browser_widths(html, width, tmp_path) == {"inner": width, "wants": width, "wide": []}


def test_hardness_is_shown_where_answers_are_right_or_wrong(tmp_path):
    for problem_type, shown in ((SINGLE_LABEL, True), (REGRESSION, False)):
        classes = 1 if problem_type == REGRESSION else 3
        write_report(learned_trace(rows=300, classes=classes, problem_type=problem_type), tmp_path / "report.html")
        assert ("How hard the rows are" in (tmp_path / "report.html").read_text()) is shown


@pytest.mark.usefixtures("few")
def test_an_exit_that_gives_every_row_one_class_makes_no_row_easy(tmp_path, monkeypatch):
    trace = learned_trace(rows=600)
    logits = trace.logits.clone()
    logits[:, 0] = torch.tensor([2.0, 0.0, 0.0])
    shares = {}
    monkeypatch.setattr(
        "hf_earlyexit.reports.write.exit_shares_svg", lambda by_name, *_: shares.update(by_name) or "<svg></svg>"
    )
    write_report(dataclasses.replace(trace, logits=logits), tmp_path / "r.html", max_drop=0.05)
    assert shares["rows"][0] == 0.0
    assert sum(shares["rows"]) == pytest.approx(1.0)
    text = " ".join((tmp_path / "r.html").read_text(encoding="utf-8").split())
    assert "The exit after layer 1 is no better than always giving the most frequent answer" in text
    write_report(trace, tmp_path / "r.html", max_drop=0.05)
    assert shares["rows"][0] > 0.1
    assert "no better than always giving" not in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("few")
def test_f1_is_told_where_classes_are_uneven(tmp_path):
    trace = learned_trace(rows=600)
    write_report(trace, tmp_path / "even.html", max_drop=0.05)
    assert "macro F1" not in (tmp_path / "even.html").read_text(encoding="utf-8")
    rare = torch.cat([(trace.labels != 2).nonzero()[:, 0], (trace.labels == 2).nonzero()[:30, 0]])
    comparison = write_report(trace.select(rare), tmp_path / "uneven.html", max_drop=0.05)
    judging, policy = comparison.judging, comparison.best.chosen.policy
    layers = ee.replay(policy, judging).exit_layer
    early = judging.logits[torch.arange(judging.num_rows), torch.as_tensor(layers).long() - 1].argmax(-1)
    text = " ".join((tmp_path / "uneven.html").read_text(encoding="utf-8").split())
    assert f"macro F1 of the early answers is {f1_score(judging.labels, early, average='macro'):.4f}" in text


@pytest.mark.usefixtures("few")
def test_pictures_that_left_early_and_wrong_are_shown_small_and_no_other_is_opened(trace, tmp_path):
    numbers = []

    class Opened(list):
        def __getitem__(self, row):
            numbers.append(row)
            return Image.new("RGB", (300, 200), (row % 256, row // 256, 0))

        def __len__(self):
            return trace.num_rows

    write_report(trace, tmp_path / "r.html", pictures=Opened(), max_drop=0.05, most_mistakes=5)
    page = (tmp_path / "r.html").read_text()
    shown = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="row (\d+)">', page)
    assert len(shown) == 5
    assert [int(row) for _, row in shown] == numbers
    for data, row in shown:
        small = Image.open(io.BytesIO(base64.b64decode(data)))
        assert small.size == (96, 64)
        assert abs(small.getpixel((5, 5))[0] - int(row) % 256) < 6

"""What early answers do to each class, by hand and against scikit-learn's definitions."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, recall_score

from hf_earlyexit.calibration import CalibrationResult, MaxDrop
from hf_earlyexit.calibration.by_class import ClassReport, answers_given, class_lines, class_reports, to_show
from hf_earlyexit.errors import CheckpointError
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_earlyexit.reports.write import write_report
from hf_earlyexit.values import json_sum
from tests.samples import learned_trace

from . import calibrate


def uneven(rows=600):
    """Two classes of very different size, and exits that overlook the rare one at first."""
    trace = learned_trace(rows, classes=2, seed=1)
    labels = trace.labels.clone()
    kept = (labels == 0) | (torch.arange(rows) % 5 == 0)
    return trace.select(kept)


def test_one_label():
    draw = torch.Generator().manual_seed(0)
    early, full = torch.randn(200, 4, generator=draw), torch.randn(200, 4, generator=draw)
    labels = torch.randint(3, (200,), generator=draw)  # class 3 has no row
    reports = class_reports(early.argmax(-1), full.argmax(-1), labels, 4, SINGLE_LABEL)
    for values, logits in (("", early), ("full_", full)):
        answers, every = logits.argmax(-1).numpy(), [0, 1, 2, 3]
        f1s = f1_score(labels, answers, labels=every, average=None, zero_division=0)
        recalls = recall_score(labels, answers, labels=every, average=None, zero_division=0)
        assert [getattr(report, f"{values}f1") for report in reports] == pytest.approx(f1s.tolist())
        assert [getattr(report, f"{values}recall") for report in reports[:3]] == pytest.approx(recalls[:3].tolist())
    assert [report.num_rows for report in reports] == torch.bincount(labels, minlength=4).tolist()
    assert reports[3].recall is None


def test_many_labels_and_values():
    draw = torch.Generator().manual_seed(0)
    early, full = torch.randn(100, 3, generator=draw), torch.randn(100, 3, generator=draw)
    labels = (torch.rand(100, 3, generator=draw) < 0.3).float()
    reports = class_reports(*(answers_given(logits, MULTI_LABEL) for logits in (early, full)), labels, 3, MULTI_LABEL)
    f1s = f1_score(labels.numpy(), (early > 0).int().numpy(), average=None)
    assert [report.f1 for report in reports] == pytest.approx(f1s.tolist())
    assert class_reports(early[:, :1], full[:, :1], labels[:, :1], 1, REGRESSION) == ()


def test_of_many_classes_those_that_lose_most_are_shown():
    reports = [
        ClassReport(label=label, num_rows=10, f1=0.9 - label / 100, full_f1=0.9, recall=0.9, full_recall=0.9)
        for label in range(30)
    ]
    assert [report.label for report in to_show(reports)] == [29, 28, 27, 26, 25]
    assert to_show(reports[:8]) == reports[:8]
    lines = class_lines(reports, [f"name {label}" for label in range(30)])
    assert lines[0] == "by class (the 5 of 30 that lose most)"
    assert lines[2].split()[:4] == ["name", "29", "10", "0.6100"]
    assert class_lines(()) == []


def test_a_calibration_prints_and_keeps_them(tmp_path):
    trace = uneven()
    result = calibrate(trace, "confidence", MaxDrop(0.02))
    assert result.metric == "f1-macro"  # the default where classes are uneven
    assert any("classes are uneven" in note and "macro F1" in note for note in result.notes)
    scores, answers = result.policy.scan(trace)
    early = answers[torch.arange(trace.num_rows), result.policy.decide(scores)].argmax(-1)
    f1s = f1_score(trace.labels, early, average=None)
    assert [report.f1 for report in result.classes] == pytest.approx(f1s.tolist())
    assert np.mean(f1s) == pytest.approx(result.quality)
    rare = next(line for line in str(result).splitlines() if line.startswith("1  "))
    assert rare.split()[1:4] == [str(int((trace.labels == 1).sum())), f"{f1s[1]:.4f}", f"{result.classes[1].full_f1:.4f}"]
    result.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == result


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda classes: classes[1].update(f1=1.5), "classes[1].f1"),
        (lambda classes: classes[0].pop("recall"), "classes[0].recall"),
        (lambda classes: classes[0].update(more=1), "classes[0].more"),
        (lambda classes: classes.reverse(), "classes[0].label"),
    ],
)
def test_damaged_classes_are_refused(edit, field):
    values = calibrate(learned_trace(300), "confidence", MaxDrop(0.02), folds=0).to_dict()
    values = json.loads(json.dumps(values))
    edit(values["classes"])
    values["sha256"] = json_sum({name: value for name, value in values.items() if name != "sha256"})
    with pytest.raises(CheckpointError) as caught:
        CalibrationResult.from_dict(values)
    assert caught.value.field == field


def test_the_report_shows_them(tmp_path):
    trace = uneven()
    result = calibrate(trace, "confidence", MaxDrop(0.02))
    write_report(trace, tmp_path / "r.html", policy=result.policy, label_names=["common <b>", "rare"])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "By class, early answers beside the full model's" in page
    assert "<td>common &lt;b&gt;</td>" in page
    assert "<td>rare</td>" in page
    numbers = learned_trace(300, classes=1, problem_type=REGRESSION)
    write_report(dataclasses.replace(numbers), tmp_path / "n.html", max_drop=0.2)
    assert "By class" not in (tmp_path / "n.html").read_text(encoding="utf-8")

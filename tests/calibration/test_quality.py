"""Metrics against scikit-learn and SciPy, and calibration in their units."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics as sk

from hf_earlyexit.calibration import METRICS, MaxDrop, replay
from hf_earlyexit.calibration.quality import find_metric
from hf_earlyexit.errors import CalibrationError, UnknownNameError
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from tests.samples import learned_trace
from tests.work import calls

from . import calibrate

NAMES = ("accuracy", "f1:0", "f1:1", "f1-macro", "balanced-accuracy", "matthews", "recall-at-precision:0.8")
ORACLES = {
    "accuracy": sk.accuracy_score,
    "f1:0": lambda truth, answers: sk.f1_score(truth, answers, pos_label=0),
    "f1:1": sk.f1_score,
    "f1-macro": lambda truth, answers: sk.f1_score(truth, answers, average="macro"),
    "balanced-accuracy": sk.balanced_accuracy_score,
    "matthews": sk.matthews_corrcoef,
}


def uneven_trace(rows=600, share=0.15, seed=0, **fields):
    """Two classes, the second rare; early exits overlook it."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=generator) < share).long()
    depth = torch.arange(1, 5).view(1, 4, 1)
    noise = torch.randn(rows, 4, 2, generator=generator)
    logits = torch.eye(2)[labels][:, None] * depth + noise
    logits[..., 0] += torch.tensor([2.5, 1.5, 0.7, 0.0])
    return type(learned_trace())(logits=logits, labels=labels, exit_layers=(1, 2, 3, 4), **fields)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        (name, classes)
        for name in NAMES
        if name in ORACLES
        for classes in (2, 4)
        if classes == 2 or not name.startswith("f1:")
    ],
)  # scikit-learn's binary F1 is for two classes
def test_values_are_those_of_scikit_learn(name, classes):
    trace = learned_trace(300, classes=classes, seed=3)
    logits, truth = trace.logits[:, 1], trace.labels
    metric = find_metric(name, SINGLE_LABEL)
    assert metric.value(logits, truth, SINGLE_LABEL) == pytest.approx(ORACLES[name](truth, logits.argmax(-1)))
    assert metric.name == name


def test_recall_at_a_precision_is_that_of_scikit_learns_curve():
    trace = learned_trace(400, classes=2, seed=4)
    logits = (trace.logits[:, 0] * 2).round() / 2  # with ties
    precision, recall, _ = sk.precision_recall_curve(trace.labels, logits[:, 1] - logits[:, 0])
    for least in (0.5, 0.8, 0.95):
        metric = find_metric(f"recall-at-precision:{least}", SINGLE_LABEL)
        reached = recall[:-1][precision[:-1] >= least].max(initial=0.0)
        assert metric.value(logits, trace.labels, SINGLE_LABEL) == pytest.approx(reached)


def test_values_of_regression():
    trace = learned_trace(200, classes=1, problem_type=REGRESSION)
    logits, labels = trace.logits[:, 0], (trace.labels * 3).round()  # with ties
    oracles = {
        "mae": -sk.mean_absolute_error(labels, logits),
        "mse": -sk.mean_squared_error(labels, logits),
        "spearman": spearmanr(labels.flatten(), logits.flatten()).statistic,
    }
    for name, value in oracles.items():
        assert find_metric(name, REGRESSION).value(logits, labels, REGRESSION) == pytest.approx(value)


@pytest.mark.parametrize("name", [*NAMES, "custom"])
def test_standard_errors_are_those_of_a_bootstrap(name):
    trace = uneven_trace(800, share=0.3)
    early, full, labels = trace.logits[:, 1], trace.logits[:, -1], trace.labels
    metric = find_metric(ORACLES["f1-macro"] if name == "custom" else name, SINGLE_LABEL)
    draws = np.random.default_rng(0).integers(0, 800, (400, 800))
    differences = [
        metric.value(early[rows], labels[rows], SINGLE_LABEL) - metric.value(full[rows], labels[rows], SINGLE_LABEL)
        for rows in map(torch.from_numpy, draws)
    ]
    assert metric.compare(early, full, labels, SINGLE_LABEL).standard_error == pytest.approx(np.std(differences), rel=0.45)
    if metric.is_mean or name in ORACLES:  # the influence of each row is more exact than a jackknife over 20 groups
        assert metric.compare(early, full, labels, SINGLE_LABEL).standard_error == pytest.approx(
            np.std(differences), rel=0.12
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_that_rows_leave_with_are_judged_as_any_others(name):
    trace, metric = uneven_trace(200, share=0.3), find_metric(name, SINGLE_LABEL)
    draw = torch.Generator().manual_seed(0)
    for places in (None, torch.randperm(200, generator=draw)[:150]):
        rows = torch.arange(200) if places is None else places
        full, labels = trace.logits[rows, -1], trace.labels[rows]
        compare = metric.at_exits(trace.logits, full, labels, SINGLE_LABEL, places)
        for _ in range(3):
            exits = torch.randint(trace.num_exits, (len(rows),), generator=draw)
            assert compare(exits) == metric.compare(trace.logits[rows, exits], full, labels, SINGLE_LABEL)
        nobody = compare(torch.full((len(rows),), trace.num_exits - 1))
        assert nobody.quality == nobody.full_quality
        assert nobody.standard_error == 0


@pytest.mark.parametrize("name", ["f1-macro", "balanced-accuracy", "matthews"])
def test_what_each_exit_says_is_looked_for_once_for_all_settings(name):
    trace, metric = uneven_trace(200), find_metric(name, SINGLE_LABEL)

    def go():
        compare = metric.at_exits(trace.logits, trace.logits[:, -1], trace.labels, SINGLE_LABEL)
        for index in range(40):
            compare(torch.full((200,), index % trace.num_exits))

    assert calls(go, "problem_types.py")["problem_types.py:predictions"] == trace.num_exits + 1


@pytest.mark.parametrize("name", NAMES)
def test_the_metric_on_parts_of_the_rows_is_that_of_the_rows_alone(name):
    trace, metric = uneven_trace(200, share=0.3), find_metric(name, SINGLE_LABEL)
    logits, labels = trace.logits[:, 1].round(), trace.labels  # with ties
    parts = torch.rand(8, 200, generator=torch.Generator().manual_seed(0)) < 0.8
    alone = [metric.value(logits[rows], labels[rows], SINGLE_LABEL) for rows in parts]
    assert metric.values_on(parts, logits, labels, SINGLE_LABEL).tolist() == alone


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_kept_in_the_metric_that_was_named(name, per_exit):
    trace = uneven_trace()
    drop = 0.02
    result = calibrate(trace, "confidence", MaxDrop(drop), metric=name, per_exit=per_exit, keep_weak_exits=True)
    metric = find_metric(name, SINGLE_LABEL)
    scan = result.policy.scan(trace)
    taken = result.policy.decide(scan.scores)
    early = scan.answers[torch.arange(trace.num_rows), taken]
    assert result.quality == pytest.approx(metric.value(early, trace.labels, SINGLE_LABEL))
    assert result.full_quality == pytest.approx(metric.value(trace.logits[:, -1], trace.labels, SINGLE_LABEL))
    assert result.quality >= result.full_quality - drop - 1e-9
    assert result.metric == name
    assert 1 < result.mean_layers < 4
    at = min(result.curve, key=lambda point: abs(point[0] - result.mean_cost))
    assert at[1] == pytest.approx(result.quality)


def test_accuracy_hides_what_f1_shows():
    """One point of accuracy may be many points of the rare class's F1; the default sees it and says so."""
    trace = uneven_trace(3000)
    options = {"keep_weak_exits": True, "folds": 0}
    blind = calibrate(trace, "confidence", MaxDrop(0.01), metric="accuracy", **options)
    seen = calibrate(trace, "confidence", MaxDrop(0.01), **options)
    lost = {name: replay(found.policy, trace, "f1:1") for name, found in (("blind", blind), ("seen", seen))}
    assert lost["blind"].full_quality - lost["blind"].quality > 0.02
    assert lost["seen"].full_quality - lost["seen"].quality < 0.02
    assert seen.metric == "f1-macro"
    assert any("classes are uneven" in note for note in seen.notes)
    assert not any("uneven" in note for note in blind.notes)


def test_only_uneven_classes_change_the_default():
    even = learned_trace(300, classes=2)
    assert calibrate(even, "confidence", folds=0).metric == "accuracy"
    values = learned_trace(100, classes=1, problem_type=REGRESSION)
    assert calibrate(values, "patience", options={"tolerance": 0.1}, folds=0).metric == "mse"


def test_functions_of_ones_own():
    trace = learned_trace(300)

    def cautious(answers, labels):
        return float((answers == labels).mean()) - float((answers == 0).mean())

    result = calibrate(trace, "confidence", MaxDrop(0.05), metric=cautious, folds=0)
    assert result.metric == "cautious"
    full = trace.logits[:, -1].argmax(-1).numpy()
    assert result.full_quality == pytest.approx(cautious(full, trace.labels.numpy()))
    with pytest.raises(CalibrationError, match=r"metric <lambda> gave nan"):
        calibrate(trace, "confidence", metric=lambda answers, labels: math.nan)


@pytest.mark.parametrize(
    ("metric", "problem_type", "error", "words"),
    [
        ("accurcy", SINGLE_LABEL, UnknownNameError, "Did you mean 'accuracy'"),
        ("f1:x", SINGLE_LABEL, CalibrationError, "cannot be read"),
        ("f1:9", SINGLE_LABEL, CalibrationError, "no class 9"),
        ("f1:0.5", SINGLE_LABEL, CalibrationError, "class number"),
        ("recall-at-precision:2", SINGLE_LABEL, CalibrationError, r"share in \(0, 1\]"),
        ("recall-at-precision", SINGLE_LABEL, CalibrationError, "for 2 classes; there are 3"),
        ("spearman", SINGLE_LABEL, CalibrationError, "not for single_label_classification; these are: accuracy"),
        ("matthews", MULTI_LABEL, CalibrationError, "not for multi_label"),
        (3, SINGLE_LABEL, CalibrationError, "metric is 3"),
    ],
)
def test_metrics_that_cannot_be_are_refused(metric, problem_type, error, words):
    with pytest.raises(error, match=words):
        calibrate(learned_trace(100, problem_type=problem_type), "confidence", metric=metric)


def test_every_metric_by_name_is_tried_here():
    tried = {name.partition(":")[0] for name in (*NAMES, "mae", "mse", "spearman")}
    assert tried == set(METRICS.names())

"""Metrics of exits, checked by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from hf_earlyexit.errors import UnknownNameError
from hf_earlyexit.metrics import f1, right_exits
from hf_earlyexit.problem_types import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, row_quality
from hf_earlyexit.trace import ExitTrace
from hf_earlyexit.training.metrics import EXIT_METRICS, default_exit_metric, exit_metrics


def one_hot(answers, classes=3):
    return np.eye(classes, dtype=np.float32)[answers]


def test_every_exit_gets_its_own_number():
    labels = np.array([0, 1, 2, 0])
    logits = np.stack([one_hot([0, 0, 0, 1]), one_hot([0, 1, 0, 1]), one_hot([0, 1, 2, 0])], 1)
    assert exit_metrics(logits, labels, [2, 5, 12], "accuracy") == {
        "exit_2_accuracy": 0.25,
        "exit_5_accuracy": 0.5,
        "exit_12_accuracy": 1.0,
    }


def test_ignored_rows_are_left_out():
    labels = np.array([0, -100, 2, -100])
    logits = one_hot([0, 1, 1, 1])[:, None]
    assert exit_metrics(logits, labels, [1], "accuracy") == {"exit_1_accuracy": 0.5}
    values = np.array([1.0, -100.0])
    assert exit_metrics(np.array([[[1.0]], [[0.0]]]), values, [1], "mse") == {"exit_1_mse": 5000.0}


def test_accuracy_of_many_labels_counts_labels():
    labels = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    logits = np.array([[2.0, -1.0, -1.0], [0.0, -1.0, 3.0]])  # right, right, wrong; right (0 is no), right, wrong
    assert EXIT_METRICS.get("accuracy")(logits, labels) == pytest.approx(4 / 6)


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (3, "macro")])
def test_f1_of_classes(classes, average):
    generator = np.random.default_rng(0)
    labels, answers = generator.integers(0, classes, 50), generator.integers(0, classes, 50)
    got = EXIT_METRICS.get("f1")(one_hot(answers, classes), labels)
    assert got == pytest.approx(f1_score(labels, answers, average=average))


def test_f1_of_many_labels_is_micro_averaged():
    labels = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    logits = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # 2 hits, 1 false alarm, 1 miss
    assert EXIT_METRICS.get("f1")(logits, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_matthews_is_that_of_scikit_learn():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 3, 60)
    answers = np.where(generator.random(60) < 0.5, labels, generator.integers(0, 3, 60))
    got = EXIT_METRICS.get("matthews")(one_hot(answers), labels)
    assert got == pytest.approx(matthews_corrcoef(labels, answers))
    assert got > 0.2


def test_spearman_sees_ranks_alone():
    labels = np.array([0.1, 0.2, 0.3, 5.0])
    assert EXIT_METRICS.get("spearman")(np.array([[1.0], [10.0], [11.0], [12.0]]), labels) == pytest.approx(1.0)
    assert EXIT_METRICS.get("spearman")(-labels[:, None], labels) == pytest.approx(-1.0)
    # ranks 2 1 4 3 against 1 2 3 4: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6
    assert EXIT_METRICS.get("spearman")(np.array([[2.0], [1.0], [4.0], [3.0]]), labels) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("values", "labels"),
    [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), ([1.0], [2.0])],
    ids=["constant answers", "constant labels", "one row"],
)
def test_spearman_of_what_does_not_vary_is_zero(values, labels):
    assert EXIT_METRICS.get("spearman")(np.array(values)[:, None], np.array(labels)) == 0.0


def test_mse_is_the_mean_of_squares():
    assert EXIT_METRICS.get("mse")(np.array([[1.0], [3.0]]), np.array([0.0, 1.0])) == pytest.approx((1 + 4) / 2)


def test_problem_types_have_metrics_of_their_own():
    assert [default_exit_metric(problem) for problem in (SINGLE_LABEL, MULTI_LABEL, REGRESSION)] == [
        "accuracy",
        "f1",
        "spearman",
    ]
    assert {default_exit_metric(problem) for problem in PROBLEM_TYPES} <= set(EXIT_METRICS.names())


def test_an_unknown_metric_comes_with_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"Unknown exit metric 'spearmann'. Did you mean 'spearman'"):
        exit_metrics(np.zeros((1, 1, 3)), np.array([0]), [1], "spearmann")


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_a_label_is_said_from_a_logit_above_zero_which_is_one_half(metric):
    logits = np.array([[[0.25, -0.25]], [[0.1, 3.0]]], dtype=np.float32)
    labels = np.array([[1.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    assert exit_metrics(logits, labels, [1], metric) == {f"exit_1_{metric}": 1.0}


def test_labels_between_0_and_1_count_as_calibration_counts_them():
    logits = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    labels = torch.tensor([[0.5, 0.4, 0.1], [0.0, 0.9, 0.3]])  # given: the first label of row 0, the second of row 1
    quality = row_quality(logits, labels, MULTI_LABEL).mean()
    metrics = exit_metrics(logits[:, None].numpy(), labels.numpy(), [4], "accuracy")
    assert metrics["exit_4_accuracy"] == pytest.approx(float(quality)) == pytest.approx(5 / 6)
    assert exit_metrics(logits[:, None].numpy(), labels.numpy(), [4], "f1")["exit_4_f1"] == pytest.approx(0.8)
    assert f1(logits, labels, MULTI_LABEL) == pytest.approx(0.8)
    trace = ExitTrace(logits=logits[:, None], labels=labels, exit_layers=(4,), problem_type=MULTI_LABEL)
    assert right_exits(trace)[:, 0].tolist() == [False, True]

"""ROUGE-L and BLEU-1 against sums done by hand."""

import math

import pytest

from hf_earlyexit.errors import DataError
from hf_earlyexit.generation.metrics import bleu_1, rouge_l


def f(precision, recall):
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision)


@pytest.mark.parametrize(
    ("caption", "references", "expected"),
    [
        ("A dog runs.", ["a dog runs"], 1.0),
        ("a dog runs", ["a cat sits there"], f(1 / 3, 1 / 4)),
        ("dog a runs", ["a dog runs"], f(2 / 3, 2 / 3)),  # order counts
        ("a dog runs fast", ["a dog", "the big dog runs fast now"], f(3 / 4, 1.0)),  # each the best of its own reference
        ("a", ["b"], 0.0),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_rouge_l(caption, references, expected):
    assert rouge_l([caption], [references]) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("caption", "references", "expected"),
    [
        ("the the the the", ["the cat is on the mat", "a cat"], 2 / 4),  # "a cat" is as near in length
        ("a dog", ["a dog runs far"], math.exp(1 - 4 / 2)),
        ("a dog runs", ["a dog", "dog runs"], 1.0),
        ("", ["a"], 0.0),
    ],
)
def test_bleu_1(caption, references, expected):
    assert bleu_1([caption], [references]) == [pytest.approx(expected)]


@pytest.mark.parametrize("metric", [rouge_l, bleu_1])
def test_references_that_do_not_fit(metric):
    with pytest.raises(DataError, match="2 texts and references of 1;"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="references of text 0"):
        metric(["a"], [[]])
    with pytest.raises(DataError, match="references of text 0"):
        metric(["a"], ["a"])

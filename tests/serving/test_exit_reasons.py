"""Why a row left, in sentences that say what happened."""

import pytest

from hf_earlyexit.serving.exit_reasons import ExitView, in_words


def views(predictions, scores, thresholds, muted=()):
    """Exits after layers 2, 4, 6, ..."""
    return [
        ExitView(2 * index + 2, said, None if index in muted else score, bar, "muted" if index in muted else "")
        for index, (said, score, bar) in enumerate(zip(predictions, scores, thresholds, strict=True))
    ]


@pytest.mark.parametrize(
    ("exits", "taken", "told"),
    [
        (
            views(["good", "good", "good"], [0.4, 0.95, 0.99], [0.9, 0.9, None]),
            1,
            "Left after layer 4 of 6 because its score 0.95 reached the threshold 0.9. Layers 2 and 4 agreed on good.",
        ),
        (
            views(["bad", "good", "good"], [0.4, 0.95, 0.99], [0.9, 0.9, None]),
            1,
            "Left after layer 4 of 6 because its score 0.95 reached the threshold 0.9. Layers 2 and 4 disagreed: bad "
            "before, good from then on.",
        ),
        (
            views(["bad", "good", "bad"], [0.4, 0.7, 0.99], [0.9, 0.9, None]),
            2,
            "Went through all 6 layers because no score reached its threshold; nearest was layer 4 with 0.7 of 0.9. The "
            "answer changed 2 times: bad at layer 2, good from layer 4, bad from layer 6.",
        ),
        (
            views(["good", "good", "bad"], [0.95, 0.7, 0.99], [0.9, 0.9, None]),
            0,
            "Left after layer 2 of 6 because its score 0.95 reached the threshold 0.9. The last layer would say bad.",
        ),
        (
            views(["x", "good", "good"], [0.4, 0.95, 0.99], [None, 0.9, None], muted=[0]),
            1,
            "Left after layer 4 of 6 because its score 0.95 reached the threshold 0.9. Layer 2 is muted and had no say.",
        ),
        (
            views(["good", "good"], [0.4, 0.95], [None, None]),
            1,
            "Went through all 4 layers because no exit before the last is open. Layers 2 and 4 agreed on good.",
        ),
    ],
)
def test_sentences(exits, taken, told):
    assert in_words(exits, taken) == told


def test_values_neither_agree_nor_disagree():
    told = in_words(views(["0.12", "0.13", "0.5"], [1, 2, 3], [2, 2, None]), 1, classes=False)
    assert told == "Left after layer 4 of 6 because its score 2 reached the threshold 2."

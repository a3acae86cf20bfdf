"""Labels become what they plainly mean, or are refused by row and column."""

from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, Features, Value

import hf_earlyexit as ee
from hf_earlyexit.data.labelling import Labelling, class_numbers, learn_labelling
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_earlyexit.training.data import label_names

WORDS = Labelling(SINGLE_LABEL, 3, ("bad", "fair", "good"))


@pytest.mark.parametrize(
    ("labels", "options", "names"),
    [
        (["pos", "neg", "pos"], {}, ("neg", "pos")),
        (["pos", " neg ", "pos"], {}, ("neg", "pos")),
        (["pos", "neg"], {"names": ["pos", "neg"]}, ("pos", "neg")),
        ([True, False], {}, ("False", "True")),
        (["true", "false"], {}, ("false", "true")),
        ([0, 1, 2], {}, None),
        (["0", "1", "1"], {}, None),
        ([0, 1], {"names": ["bad", "good"]}, ("bad", "good")),
        ([1, 2, 3], {"names": ["1", "2", "3"]}, ("1", "2", "3")),
        ([0, 1], {"class_names": ["bad", "good"]}, ("bad", "good")),
        ([0, 1, 1], {"texts": ["no", "yes", None]}, ("no", "yes")),
        ([0.0, 1.0], {"problem_type": SINGLE_LABEL}, None),
        (["1", "2", "x"], {}, ("1", "2", "x")),
    ],
)
def test_classes_and_their_names(labels, options, names):
    labelling = learn_labelling(labels, "label", **options)
    assert labelling.problem_type == SINGLE_LABEL
    assert labelling.names == names
    assert labelling.notes == ()


def test_whole_numbers_written_as_values_are_classes_with_a_note_or_refused():
    labelling = learn_labelling([1.0, 0.0, 1.0], "label")
    assert (labelling.problem_type, labelling.num_labels) == (SINGLE_LABEL, 2)
    assert "taken as classes" in labelling.notes[0]
    assert learn_labelling(["0.0", "1.0"], "label") == labelling
    for labels in ([1.0, 2.0], [5.0, 0.0, 1.0], [0.0, 0.0]):
        with pytest.raises(ee.EarlyExitError, match="--problem_type"):
            learn_labelling(labels, "label")
        assert learn_labelling(labels, "label", problem_type=REGRESSION).problem_type == REGRESSION


@pytest.mark.parametrize("labels", [[0.5, 1.0], ["0.5", "3"], [1, 2.5]])
def test_other_numbers_are_values(labels):
    assert learn_labelling(labels, "label").problem_type == REGRESSION


def test_lists_of_zeros_and_ones_are_several_labels_a_row():
    labelling = learn_labelling([[0, 1, 1], [1, 0, 0]], "label", names=["a", "b", "c"])
    assert (labelling.problem_type, labelling.num_labels, labelling.names) == (MULTI_LABEL, 3, ("a", "b", "c"))
    assert class_numbers([[0, 1, 1]], "label", labelling) == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, None], {}, r"Row 1 has the label None \(column 'stars'\)"),
        (["a", ""], {}, "Row 1 has the label ''"),
        ([0.5, float("nan")], {}, "Row 1 has the label nan"),
        ([0.5, float("inf")], {}, "Row 1 has the label inf"),
        ([0, -1], {}, "Row 1 has the label -1.*without a label"),
        ([1, 2], {}, "no row has class 0"),
        ([0, 10**400], {}, "name the column of labels"),
        ([0, 2], {"names": ["a", "b"]}, "Row 1 has the label 2.*2 names"),
        ([0, "x"], {}, "Row 1 has the label 'x'.*where row 0 has 0"),
        (["Pos", "neg", "pos"], {}, "differs from 'Pos' by its case alone"),
        (["x", "y"], {"names": ["x", "z"]}, "Row 1 has the label 'y'.*none of --label_names"),
        ([f"text {row}" for row in range(30)], {}, "another label in every one of its 30 rows"),
        ([0, 1, 0], {"texts": ["neg", "pos", "negative"]}, "Class 0 is called 'neg' and, in row 2, 'negative'"),
        ([0, 1], {"texts": ["same", "same"]}, "Two classes are called 'same'"),
        ([[0, 1], [0, 1, 1]], {}, "Row 1 has the label .*list of 2 zeros and ones"),
        ([[0, 2]], {}, "Row 0 has the label"),
        ([["sports"]], {}, "Row 0 has the label"),
        ([], {}, "has no rows"),
        ([0, 1], {"problem_type": "classification"}, "expected one of single_label"),
        (["a", "b"], {"problem_type": REGRESSION}, "Row 0 has the label 'a'"),
        ([0.5, 1.0], {"problem_type": SINGLE_LABEL}, "Row 0 has the label 0.5"),
    ],
)
def test_labels_whose_meaning_is_not_plain_are_refused_by_row(labels, options, message):
    with pytest.raises(ee.EarlyExitError, match=message):
        learn_labelling(labels, "stars", **options)


@pytest.mark.parametrize(
    ("labels", "labelling", "class_names", "numbers"),
    [
        (["good", "bad", "fair"], WORDS, None, [2, 0, 1]),
        (["GOOD", " Bad "], WORDS, None, [2, 0]),
        ([2, 0], WORDS, None, [2, 0]),
        (["2", "0"], WORDS, None, [2, 0]),
        ([2, 0], Labelling(SINGLE_LABEL, 2, ("2", "0")), None, [0, 1]),
        ([0, 1, 2], WORDS, ["good", "bad", "fair"], [2, 0, 1]),  # the column numbers its classes in another order
        ([0, 1], WORDS, ["good", "bad"], [2, 0]),
        ([0, 1], Labelling(SINGLE_LABEL, 2), ["good", "bad"], [0, 1]),
        ([True, False], Labelling(SINGLE_LABEL, 2, ("false", "true")), None, [1, 0]),
        ([1.0, 0.0], Labelling(SINGLE_LABEL, 2), None, [1, 0]),
        ([1, 2], Labelling(REGRESSION, 1), None, [1.0, 2.0]),
    ],
)
def test_labels_of_a_trained_model_s_rows(labels, labelling, class_names, numbers):
    assert class_numbers(labels, "label", labelling, class_names) == numbers


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        (["good", "great"], None, "Row 1 has the label 'great'.*expected one of bad, fair, good.*--label_names"),
        ([0, 3], None, "Row 1 has the label 3"),
        ([0, -1], None, "Row 1 has the label -1"),
        ([0, 1], ["negative", "positive"], "The classes of the column 'label' are negative, positive"),
    ],
)
def test_labels_that_the_model_has_not(labels, class_names, message):
    with pytest.raises(ee.EarlyExitError, match=message):
        class_numbers(labels, "label", WORDS, class_names)


def test_a_model_s_own_labelling():
    config = SimpleNamespace(resolved_problem_type=SINGLE_LABEL, num_labels=2, id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert Labelling.of_model(config) == Labelling(SINGLE_LABEL, 2)
    config.id2label = {1: "b", 0: "a"}
    assert Labelling.of_model(config).names == ("a", "b")


def test_label_names_of_a_data_set():
    assert label_names(Dataset.from_dict({"label": ["pos", "neg"]})) == ["neg", "pos"]
    assert label_names(Dataset.from_dict({"label": [0, 1], "label_text": ["neg", "pos"]})) == ["neg", "pos"]
    assert label_names(Dataset.from_dict({"label": [0, 1]})) == ["LABEL_0", "LABEL_1"]
    assert label_names(Dataset.from_dict({"label": [0.5, 1.0]})) is None
    features = Features({"label": ClassLabel(names=["a", "b", "c"]), "label_text": Value("string")})
    assert label_names(Dataset.from_dict({"label": [0], "label_text": ["x"]}, features=features)) == ["a", "b", "c"]
    for texts, labels in ((["neg", "negative", "pos"], [0, 0, 1]), (["bad", "good"], [1, 2])):
        with pytest.raises(ee.EarlyExitError):
            label_names(Dataset.from_dict({"label": labels, "label_text": texts}))

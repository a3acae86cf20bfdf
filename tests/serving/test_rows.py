"""Windows of rows, and errors in the place of rows that cannot be read."""

import pytest
from datasets import Dataset

from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.serving.rows import ReadRow, check_any_token, check_ids, encode_window
from hf_earlyexit.serving.tables import windows


def test_windows_hold_every_row_in_order_and_read_no_further():
    read = []

    def supply():
        for number in range(7):
            read.append(number)
            yield f"w{number}"

    parts = windows(supply(), 3)
    assert next(parts) == ["w0", "w1", "w2"]
    assert read == [0, 1, 2]
    assert [row for part in parts for row in part] == ["w3", "w4", "w5", "w6"]


def test_data_sets_come_in_windows_whether_stored_or_streamed():
    rows = Dataset.from_dict({"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [0, 1, 0]})
    expected = [[("a", "d"), ("b", "e")], [("c", "f")]]
    assert list(windows(rows, 2)) == list(windows(rows.to_iterable_dataset(), 2)) == expected
    ids = Dataset.from_dict({"input_ids": [[5], [6, 7]], "text": ["a", "b"]})
    assert list(windows(ids, 9)) == [[{"input_ids": [5]}, {"input_ids": [6, 7]}]]


def test_a_bare_text_is_refused():
    with pytest.raises(UsageError, match=r"pass \[text\]"):
        next(windows("w5", 2))


def test_errors_take_the_place_of_their_rows(tokenizer):
    encoded = encode_window(["w5", None, ("w6", "w7"), 3.5, {"input_ids": [5, 6]}], tokenizer, first=100)
    assert [type(row) for row in encoded] == [dict, DataError, dict, DataError, dict]
    assert encoded[0] == dict(tokenizer("w5"))
    assert encoded[2] == dict(tokenizer("w6", "w7"))
    assert str(encoded[1]).startswith("Row 101 is None; expected a text, a pair")


def test_rows_that_have_been_read_stay_as_they_are_and_others_are_read(tokenizer):
    known = ReadRow(input_ids=[2, 5, 3])
    assert encode_window([known, known], None) == [known, known]
    padded = {"input_ids": [2, 6, 3, 0], "attention_mask": [1, 1, 1, 0]}
    told = encode_window([known, "w7", padded], tokenizer)
    assert [row["input_ids"] for row in told] == [[2, 5, 3], [2, 7, 3], [2, 6, 3]]
    assert encode_window([], tokenizer) == []


def test_a_text_the_tokenizer_chokes_on_costs_no_other_row():
    class Picky:
        model_max_length = 10

        def __call__(self, texts, **options):
            if any("bad" in text for text in texts):
                raise RuntimeError("no such thing")
            return {"input_ids": [[len(text)] for text in texts]}

    encoded = encode_window(["a", "bad", "abc"], Picky())
    assert encoded[0::2] == [{"input_ids": [1]}, {"input_ids": [3]}]
    assert str(encoded[1]).startswith("Row 1 cannot be tokenized (no such thing)")


def test_padding_at_the_end_is_cut_and_masked_tokens_elsewhere_stay():
    rows = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [0, 5, 0, 6], "attention_mask": [0, 1, 0, 1]},
        {"input_ids": [5, 6], "attention_mask": [0, 0]},
    ]
    assert encode_window(rows, None) == [{"input_ids": [5, 6], "attention_mask": [1, 1]}, rows[1], rows[2]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": []}, "has 0 tokens; this model takes 1 to 4"),
        ({"input_ids": [1] * 5}, "has 5 tokens"),
        ({"input_ids": [1, 9]}, "token ids this model does not know; expected whole numbers from 0 to 8"),
        ({"input_ids": [1, -1]}, "does not know"),
        ({"input_ids": [1, 2.5]}, "does not know"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "different lengths"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 2]}, "has token_type_ids from 0 to 2; this model knows 0 to 1"),
        ({"input_ids": [1, 2], "token_type_ids": [-1, 0]}, "has token_type_ids from -1 to 0"),
    ],
)
def test_ids_a_model_cannot_read_are_told(row, said):
    assert said in str(check_ids(row, 0, 9, 4, 2))
    assert check_ids({"input_ids": [0, 8], "token_type_ids": [0, 1]}, 0, 9, 4, 2) is None


def test_a_row_needs_a_real_token_where_attention_to_nothing_has_no_answer():
    assert check_any_token({"input_ids": [5, 6], "attention_mask": [0, 1]}, 3) is None
    assert check_any_token({"input_ids": [5, 6]}, 3) is None
    assert str(check_any_token({"input_ids": [5, 6], "attention_mask": [0, 0]}, 3)).startswith("Row 3 has no real token")

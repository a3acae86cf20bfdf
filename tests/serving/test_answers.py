"""Answers as they are put down, by hand."""

import torch

from hf_earlyexit.serving.answers import ERROR, POLICY, Answers, Leaving


def test_an_answer_of_which_one_number_is_not_finite_is_an_error_of_its_row():
    answers = Answers.blank(4, 2)
    logits = torch.tensor([[1.0, 2.0], [3.0, torch.inf], [torch.nan, 4.0]])
    answers.write([Leaving([3, 0, 1], logits, 2, torch.tensor([0.5, 0.6, 0.7]), [POLICY] * 3)])
    answers.refuse_what_is_not_finite(10)
    assert {place: str(error).split(" has")[0] for place, error in answers.errors.items()} == {0: "Row 10", 1: "Row 11"}
    assert answers.exit_index.tolist() == [-1, -1, -1, 2]
    assert answers.reason == [ERROR, ERROR, "deadline", POLICY]
    assert answers.logits[3].tolist() == [1.0, 2.0]
    assert answers.logits[:3].isnan().all()
    assert answers.score[:3].isnan().all()

"""Rows that are called off, rows whose layers fail, and chunks that have waited long enough."""

import math

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.serving import course as courses
from hf_earlyexit.serving.answers import DEADLINE
from hf_earlyexit.serving.course import Course
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker

CLOSED = ee.ConfidencePolicy(thresholds=[None] * 3)


@pytest.fixture(scope="module")
def rows(tokenizer, random_texts):
    return encode_rows([*random_texts(11, seed=4), "w5 w6"], tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def every_exit(model, rows):
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False).exit_logits[0] for row in rows]


@torch.inference_mode()
def finish(course):
    while course.step():
        pass
    assert not course.busy


def arrivals(scheduler, *chunks):
    parts = iter(chunks)
    return lambda: None if (part := next(parts, None)) is None else scheduler.begin(part)


def left_of(gone):
    return {place: (index, why) for place, _, index, why in each_of(gone)}


def each_of(gone):
    for group in gone:
        for row, place in enumerate(group.places):
            yield place, group.answer[row], group.exit_index, group.reasons[row]


def test_a_row_that_is_called_off_leaves_with_the_last_exit_it_passed_and_the_others_go_on(model, rows):
    scheduler, gone, looks = Scheduler(ModelWalker(model), CLOSED, 4096, ends_at=math.inf), [], []

    def off(places):
        looks.append(list(places))
        return [DEADLINE if place in (1, 4) and len(looks) == 3 else None for place in places]

    finish(Course(scheduler, arrivals(scheduler, list(enumerate(rows))), gone.append, off=off))
    left, expected = left_of(gone), every_exit(model, rows)
    assert left == {place: (1, DEADLINE) if place in (1, 4) else (3, "last layer") for place in range(12)}
    assert [len(places) for places in looks] == [12, 12, 12, 10]
    for place, answer, index, _ in each_of(gone):
        assert torch.allclose(answer, expected[place][index], atol=1e-5)


@pytest.mark.parametrize("clock", [None, math.inf])
def test_a_row_that_has_passed_no_exit_leaves_without_an_answer(model, rows, clock):
    scheduler, gone = Scheduler(ModelWalker(model), CLOSED, 4096, ends_at=clock), []
    course = Course(
        scheduler, arrivals(scheduler, list(enumerate(rows))), gone.append, off=lambda places: ["cancelled"] * len(places)
    )
    finish(course)
    assert left_of(gone) == dict.fromkeys(range(12), (-1, "cancelled"))
    assert all(answer.isnan().all() for _, answer, _, _ in each_of(gone))


class Failing(ModelWalker):
    """Fails at layer 3 where a row of so many tokens is among them."""

    def run_layer(self, layer, hidden, context):
        if layer == 3 and 4 in context.lengths:
            raise RuntimeError("the third layer fails")
        return super().run_layer(layer, hidden, context)


def test_only_the_row_whose_layer_fails_is_broken(model, rows):
    scheduler, gone, broken = Scheduler(Failing(model), CLOSED, 4096), [], []
    bad = {place for place, row in enumerate(rows) if len(row["input_ids"]) == 4}
    assert 0 < len(bad) < 12
    course = Course(
        scheduler, arrivals(scheduler, list(enumerate(rows))), gone.append, broken=lambda *told: broken.append(told)
    )
    finish(course)
    assert {place for places, _ in broken for place in places} == bad
    assert all(str(error) == "the third layer fails" for _, error in broken)
    assert set(left_of(gone)) == set(range(12)) - bad
    expected = every_exit(model, rows)
    assert all(torch.allclose(answer, expected[place][3], atol=1e-5) for place, answer, _, _ in each_of(gone))


def test_a_layer_that_fails_in_a_window_is_raised(model, rows):
    with pytest.raises(RuntimeError, match="the third layer fails"):
        Scheduler(Failing(model), CLOSED, 4096).run(rows)


@pytest.mark.parametrize(("max_wait", "order"), [(math.inf, [1, 1, 1, 2, 3, 4]), (1.0, [1, 1, 2, 1, 3, 2])])
def test_who_has_waited_long_enough_goes_before_new_rows(model, rows, monkeypatch, max_wait, order):
    """Three single rows come while the clock goes on by one with each layer; alone, no chunk is half full."""
    layers = []

    class Noting(ModelWalker):
        def run_layer(self, layer, hidden, context):
            layers.append(layer)
            return super().run_layer(layer, hidden, context)

    monkeypatch.setattr(courses.time, "monotonic", lambda: float(len(layers)))
    scheduler, gone = Scheduler(Noting(model), CLOSED, 4096, ends_at=math.inf), []
    course = Course(scheduler, arrivals(scheduler, *([one] for one in enumerate(rows[:3]))), gone.append, max_wait)
    finish(course)
    assert layers[:6] == order
    assert left_of(gone) == dict.fromkeys(range(3), (3, "last layer"))

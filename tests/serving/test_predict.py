"""Answers for many rows, in the order they came."""

import threading
import time
from functools import wraps

import psutil
import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee
import hf_earlyexit.pipelines.texts  # has its window from `predict`, before a test makes that smaller
from hf_earlyexit.serving import predict
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker


def test_answers_keep_the_order_and_equal_single_rows(model, tokenizer, random_texts):
    texts = random_texts(40)
    answers = ee.predict(model, texts, tokenizer=tokenizer, max_batch_tokens=64)
    assert len(set(answers.exit_layer.tolist())) >= 3
    for row, text in enumerate(texts):
        with torch.inference_mode():
            alone = model(**tokenizer(text, return_tensors="pt"))
        assert int(alone.exit_layer) == int(answers.exit_layer[row])
        assert torch.allclose(alone.logits[0], answers.logits[row], atol=1e-5)
        assert torch.allclose(alone.exit_score[0], answers.exit_score[row], atol=1e-5)


def test_the_token_budget_changes_no_answer(model, tokenizer, random_texts):
    texts = random_texts(40, seed=1)
    small, large = (ee.predict(model, texts, tokenizer=tokenizer, max_batch_tokens=size) for size in (16, 4096))
    assert torch.equal(small.exit_layer, large.exit_layer)
    assert torch.allclose(small.logits, large.logits, atol=1e-5)


def test_the_full_model_can_be_asked_for(model, tokenizer, random_texts):
    answers = ee.predict(model, random_texts(8), tokenizer=tokenizer, early_exit=False)
    assert answers.exit_layer.tolist() == [4] * 8
    assert bool(answers.exit_score.isnan().all())


def test_no_rows_give_no_answers(model, tokenizer):
    answers = ee.predict(model, [], tokenizer=tokenizer)
    assert (answers.logits.shape, answers.exit_layer.shape, answers.exit_score.shape) == ((0, 3), (0,), (0,))


def test_nothing_but_blank_texts_is_answered_alike(model, tokenizer):
    answers = ee.predict(model, ["", " ", "\t\n"] * 5, tokenizer=tokenizer)
    assert bool(answers.logits.isfinite().all())
    assert torch.allclose(answers.logits, answers.logits[:1].expand(15, -1), atol=1e-5)


def test_a_data_set_of_pairs_equals_a_list_of_pairs(model, tokenizer, random_texts):
    first, second = random_texts(6), random_texts(6, seed=9)
    rows = Dataset.from_dict({"sentence1": first, "sentence2": second})
    told = ee.predict(model, rows, tokenizer=tokenizer)
    pairs = ee.predict(model, list(zip(first, second, strict=True)), tokenizer=tokenizer)
    assert torch.equal(told.logits, pairs.logits)


def test_a_very_long_text_is_cut_to_what_the_model_takes(model, tokenizer):
    words = " ".join(["w7"] * 10_000)
    answers = ee.predict(model, [words, "w7"], tokenizer=tokenizer)
    cut = ee.predict(model, [" ".join(["w7"] * 62)], tokenizer=tokenizer)
    assert torch.allclose(answers.logits[0], cut.logits[0], atol=1e-5)


def test_training_mode_comes_back(tiny_model, tokenizer, random_texts):
    model = tiny_model().train()
    ee.predict(model, random_texts(2), tokenizer=tokenizer)
    assert model.training


def test_a_single_text_is_not_taken_for_its_letters(model, tokenizer):
    with pytest.raises(ee.EarlyExitError, match=r"pass \[text\]"):
        ee.predict(model, "w5 w6", tokenizer=tokenizer)


def test_one_broken_row_leaves_the_others_equal(model, tokenizer, random_texts):
    texts = random_texts(1000)
    clean = ee.predict(model, texts, tokenizer=tokenizer)
    answers = ee.predict(model, [*texts[:317], None, *texts[318:]], tokenizer=tokenizer, errors="slot")
    others = torch.arange(1000) != 317
    assert list(answers.errors) == [317]
    assert (answers.reason[317], int(answers.exit_layer[317])) == ("error", 0)
    assert bool(answers.logits[317].isnan().all())
    assert torch.equal(answers.exit_layer[others], clean.exit_layer[others])
    assert torch.allclose(answers.logits[others], clean.logits[others], atol=1e-5)


def test_a_broken_row_is_raised_with_its_number(model, tokenizer):
    with pytest.raises(ee.EarlyExitError, match="Row 1 is 7; expected a text"):
        ee.predict(model, ["w5", 7], tokenizer=tokenizer)
    with pytest.raises(ee.EarlyExitError, match="Row 0 has token ids this model does not know"):
        ee.predict(model, [{"input_ids": [5, 70_000]}])


def test_a_stream_answers_in_order_and_reads_a_window_ahead(model, tokenizer, random_texts):
    texts, read = random_texts(50), []

    def supply():
        for text in texts:
            read.append(text)
            yield text

    answers = ee.stream(model, supply(), tokenizer=tokenizer, window=8)
    first = next(answers)
    assert len(read) == 8
    assert not torch.is_inference_mode_enabled()  # the caller's own code between two answers is left alone
    whole = ee.predict(model, texts, tokenizer=tokenizer)
    for place, answer in enumerate([first, *answers]):
        assert torch.allclose(answer.logits, whole.logits[place], atol=1e-5)
        assert (answer.exit_layer, answer.reason) == (int(whole.exit_layer[place]), whole.reason[place])


class ReadsAhead(ModelWalker):
    """Reads ahead as on an accelerator."""

    def __init__(self, model, cuda_graphs=True):
        super().__init__(model)
        self.reads_ahead = True


@pytest.fixture
def on_accelerator(monkeypatch):
    monkeypatch.setattr(predict, "walker_for", ReadsAhead)
    monkeypatch.setattr(predict, "WINDOW", 8)


def by_predict(model, texts, tokenizer):
    return ee.predict(model, texts, tokenizer=tokenizer).exit_layer.tolist()


def by_pipeline(model, texts, tokenizer):
    pipe = ee.pipeline(model=model, tokenizer=tokenizer, window=8)
    return [answer["exit_layer"] for answer in pipe(texts)]


@pytest.mark.parametrize("call", [by_predict, by_pipeline])
def test_rows_are_read_while_others_are_answered(model, tokenizer, random_texts, on_accelerator, monkeypatch, call):
    texts, seen = random_texts(40), []
    expected = ee.predict(model, texts, tokenizer=tokenizer, cuda_graphs=False)
    begun, going_on = threading.Event(), threading.Event()
    tokenize = type(tokenizer).__call__

    @wraps(tokenize)
    def noted(*given, **options):
        if len(seen) == 1:
            begun.set()  # the second window, before the first is answered
            assert going_on.wait(10)
        seen.append(threading.current_thread() is threading.main_thread())
        return tokenize(*given, **options)

    run = Scheduler.run

    def waiting(self, rows, *given, **options):
        assert begun.wait(10)
        going_on.set()
        return run(self, rows, *given, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", noted)
    monkeypatch.setattr(Scheduler, "run", waiting)
    assert call(model, texts, tokenizer) == expected.exit_layer.tolist()
    assert seen == [False] * 5
    assert not [thread.name for thread in threading.enumerate() if "reader" in thread.name]


def test_a_generator_in_a_pipeline_is_not_read_ahead(model, tokenizer, random_texts, on_accelerator):
    pipe, read = ee.pipeline(model=model, tokenizer=tokenizer), []
    answers = pipe(text for text in random_texts(9) if not read.append(text))
    for count, _ in enumerate(answers, 1):
        assert len(read) == count


def test_what_was_read_ahead_of_a_row_that_cannot_be_read_is_answered(model, tokenizer, random_texts, on_accelerator):
    texts = random_texts(40)

    class Torn(list):
        def __iter__(self):
            yield from texts[:20]
            raise OSError("torn")

    answers, stream = [], ee.stream(model, Torn(texts), tokenizer=tokenizer, window=8)
    with pytest.raises(OSError, match="torn"):
        answers.extend(stream)
    assert len(answers) == 16
    with pytest.raises(ee.errors.DataError, match="Row 17"):
        ee.predict(model, [*texts[:17], 5, *texts[18:]], tokenizer=tokenizer)
    slots = ee.predict(model, [*texts[:17], 5, *texts[18:]], tokenizer=tokenizer, errors="slot")
    assert list(slots.errors) == [17]


def test_after_a_deadline_no_further_rows_are_read(model, tokenizer, random_texts, on_accelerator, monkeypatch):
    read = []

    class Tokenizer:
        model_max_length = tokenizer.model_max_length

        def __call__(self, rows, **options):
            read.extend(rows)
            time.sleep(0.02)
            return tokenizer(rows, **options)

    monkeypatch.setattr(predict, "WINDOW_WITH_DEADLINE", 4)
    answers = ee.predict(model, random_texts(400), tokenizer=Tokenizer(), deadline=0)
    assert set(answers.reason) == {"deadline"}
    assert len(answers.reason) == 400
    assert len(read) < 100


def test_whoever_waits_for_an_answer_is_not_kept_waiting(model, tokenizer, random_texts, on_accelerator):
    given = []

    def rows():
        for text in random_texts(20):
            given.append(text)
            yield text

    for count, _ in enumerate(ee.stream(model, rows(), tokenizer=tokenizer, window=4)):
        assert len(given) == 4 * (count // 4 + 1)


def test_windows_change_no_answer(model, tokenizer, random_texts, monkeypatch):
    texts = random_texts(60)
    whole = ee.predict(model, texts, tokenizer=tokenizer)
    monkeypatch.setattr("hf_earlyexit.serving.predict.WINDOW", 7)
    parts = ee.predict(model, iter([*texts[:30], 5, *texts[31:]]), tokenizer=tokenizer, errors="slot")
    assert list(parts.errors) == [30]
    places = torch.arange(60) != 30
    assert torch.equal(parts.exit_layer[places], whole.exit_layer[places])


def test_a_deadline_in_the_past_answers_nobody_and_at_once(model, tokenizer, random_texts):
    answers = ee.predict(model, random_texts(300), tokenizer=tokenizer, deadline=0)
    assert (set(answers.reason), set(answers.exit_layer.tolist())) == ({"deadline"}, {0})
    assert bool(answers.logits.isnan().all())


def test_a_distant_deadline_changes_no_answer(model, tokenizer, random_texts):
    texts = random_texts(100)
    free, kept = (ee.predict(model, texts, tokenizer=tokenizer, deadline=seconds) for seconds in (None, 1000))
    assert torch.equal(free.exit_layer, kept.exit_layer)
    assert free.reason == kept.reason


@pytest.mark.parametrize(
    "wrong", [{"errors": "skip"}, {"deadline": -1}, {"deadline": float("nan")}, {"max_batch_tokens": 0}, {"layer_budget": 0}]
)
def test_arguments_out_of_range_are_refused(model, tokenizer, wrong):
    with pytest.raises(ee.EarlyExitError, match=f"{next(iter(wrong))} is .*expected"):
        ee.predict(model, ["w5"], tokenizer=tokenizer, **wrong)
    with pytest.raises(ee.EarlyExitError, match="window is 0"):
        ee.stream(model, ["w5"], tokenizer=tokenizer, window=0)


@pytest.mark.slow
def test_a_long_stream_needs_no_more_memory_than_a_short_one(model, tokenizer):
    process = psutil.Process()
    rows = ({"input_ids": [5 + number % 90, 7, 8]} for number in range(100_000))
    for count, _ in enumerate(ee.stream(model, rows), 1):
        if count == 10_000:
            start = process.memory_info().rss
    assert count == 100_000
    assert process.memory_info().rss - start < 10 * 2**20

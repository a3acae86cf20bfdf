"""The stock pipeline exits early; ours also tells where."""

import shutil
from functools import wraps

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, UsageError
from tests.conftest import SHAPE


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, tokenizer, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "beem-a"))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def layers_run():
    """Rows that passed each layer of a model, counted by hooks."""

    def attach(model):
        counts = [0] * 4
        for index, layer in enumerate(model.bert.encoder.layer):
            layer.register_forward_hook(lambda m, i, o, index=index: counts.__setitem__(index, counts[index] + len(o)))
        return counts

    return attach


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_auto_classes_bring_model_and_policy_back(auto, saved):
    model = auto.from_pretrained(saved)
    assert type(model) is ee.EarlyExitBertForSequenceClassification
    assert model.exit_policy.name == "beem-a"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stock_pipeline_runs_no_layer_after_a_row_has_left(batch_size, saved, random_texts, layers_run):
    pipe = pipeline("text-classification", model=str(saved), batch_size=batch_size)
    ours = ee.pipeline(model=str(saved), batch_size=batch_size)
    counts, texts = layers_run(pipe.model), random_texts(24)
    layers_run(ours.model)  # both are watched, so both walk the same batches through the same layers
    answers, told = pipe(texts), ours(texts)
    assert [(a["label"], a["score"]) for a in answers] == [(t["label"], t["score"]) for t in told]
    layers = [answer["exit_layer"] for answer in told]
    assert len(set(layers)) >= 3
    assert counts == [sum(layer >= depth for layer in layers) for depth in range(1, 5)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_batch_size_gives_the_stock_pipelines_answers_to_the_bit(batch_size, saved, random_texts):
    pipe, texts = pipeline("text-classification", model=str(saved), batch_size=batch_size), random_texts(24)
    answers = [(one["label"], one["score"]) for one in pipe(texts)]
    ours = ee.pipeline(model=str(saved), batch_size=batch_size)
    assert [(one["label"], one["score"]) for one in ours(texts)] == answers
    ours = ee.pipeline(model=str(saved))
    assert [(one["label"], one["score"]) for one in ours(texts, batch_size=batch_size)] == answers
    assert [(one["label"], one["score"]) for one in ours((text for text in texts), batch_size=batch_size)] == answers


def test_batch_size_changes_no_answer(saved, random_texts):
    pipe, texts = ee.pipeline(model=str(saved)), random_texts(24, seed=1)
    alone, together = pipe(texts), pipe(texts, batch_size=8)
    assert [(a["label"], a["exit_layer"]) for a in alone] == [(t["label"], t["exit_layer"]) for t in together]
    assert [a["exit_score"] for a in alone] == pytest.approx([t["exit_score"] for t in together], abs=1e-5)


def test_every_label_of_top_k_tells_the_layer(saved, random_texts):
    answer = ee.pipeline(model=str(saved))(random_texts(1), top_k=None)[0]
    assert len(answer) == 3
    assert len({one["exit_layer"] for one in answer}) == 1
    assert sum(one["score"] for one in answer) == pytest.approx(1)


def test_a_model_without_policy_tells_its_last_layer_and_no_score(tiny_model, tokenizer, random_texts):
    answer = ee.pipeline(model=tiny_model(), tokenizer=tokenizer)(random_texts(1))[0]
    assert answer["exit_layer"] == 4
    assert answer["exit_score"] is None


def test_pipeline_logits_are_those_of_the_model(saved, random_texts, tokenizer):
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(saved)
    text = random_texts(1, seed=3)[0]
    with torch.inference_mode():
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)
    assert pipeline("text-classification", model=str(saved))(text)[0]["score"] == pytest.approx(float(probabilities.max()))


def test_a_model_without_exits_is_refused(tiny_config, tokenizer):
    plain = BertForSequenceClassification(BertConfig(**SHAPE))
    with pytest.raises(ee.EarlyExitError, match="has no exits"):
        ee.pipeline(model=plain, tokenizer=tokenizer)


def test_lists_and_data_sets_run_through_the_engine_in_full_chunks(saved, random_texts):
    pipe, texts = ee.pipeline(model=str(saved)), random_texts(40, seed=2)
    chunks = []
    first = pipe.model.bert.encoder.layer[0].intermediate.dense
    first.register_forward_hook(lambda module, given, output: chunks.append(len(given[0])))
    told = pipe(texts)
    assert 0 < len(chunks) <= 2  # 40 rows of up to 12 words are not walked one by one
    expected = ee.predict(pipe.model, texts, tokenizer=pipe.tokenizer)
    assert [one["exit_layer"] for one in told] == expected.exit_layer.tolist()
    again = list(pipe(KeyDataset(Dataset.from_dict({"text": texts}), "text")))
    assert [(one["label"], one["exit_layer"]) for one in again] == [(one["label"], one["exit_layer"]) for one in told]


def test_a_generator_is_read_no_further_than_it_is_answered(saved, random_texts):
    read = []

    def supply():
        for text in random_texts(9):
            read.append(text)
            yield text

    answers = ee.pipeline(model=str(saved))(supply())
    next(answers)
    assert len(read) <= 2  # the stock pipeline looks at the first to know its kind


def test_a_generator_may_be_read_ahead_and_texts_are_tokenized_together(saved, random_texts, monkeypatch):
    pipe, texts = ee.pipeline(model=str(saved), window=4), random_texts(9)
    read, calls = [], []
    one_by_one = [pipe(text)[0] for text in texts]
    stock_call = type(pipe.tokenizer).__call__

    @wraps(stock_call)  # the pipeline reads its arguments
    def counted(*given, **more):
        calls.append(1)
        return stock_call(*given, **more)

    monkeypatch.setattr(type(pipe.tokenizer), "__call__", counted)
    answers = pipe(text for text in texts if not read.append(text))
    first = next(answers)
    assert 4 <= len(read) <= 5  # the stock pipeline looks at the first to know its kind
    together = [first, *answers]
    assert len(calls) <= 4  # windows of 4, 4 and 1
    for alone, one in zip(
        one_by_one, (answer[0] if isinstance(answer, list) else answer for answer in together), strict=True
    ):
        assert (alone["label"], alone["exit_layer"]) == (one["label"], one["exit_layer"])
        assert alone["score"] == pytest.approx(one["score"], abs=1e-6)
    calls.clear()
    assert len(pipe(texts, padding="max_length", max_length=20)) == 9
    assert len(calls) == 9  # padding is a matter of the rows of one call
    with pytest.raises(UsageError, match="window is 0; expected a whole number from 1"):
        pipe(texts, window=0)


def test_pairs_and_an_operating_point_reach_the_engine(saved, random_texts):
    pipe = ee.pipeline(model=str(saved))
    pairs = [{"text": a, "text_pair": b} for a, b in zip(random_texts(5), random_texts(5, seed=8), strict=True)]
    assert {one["exit_layer"] for one in pipe(pairs, operating_point="exact")} == {4}
    together = [one["exit_layer"] for one in pipe(pairs)]
    assert together == [pipe(pair)["exit_layer"] for pair in pairs]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_full_model_can_be_asked_for(saved, random_texts, batch_size):
    texts = random_texts(6)
    pipe = ee.pipeline(model=str(saved))
    assert min(one["exit_layer"] for one in pipe(texts, batch_size=batch_size)) < 4
    assert {one["exit_layer"] for one in pipe(texts, batch_size=batch_size, early_exit=False)} == {4}
    full = ee.pipeline(model=str(saved), early_exit=False, batch_size=batch_size)
    assert {one["exit_layer"] for one in full(texts)} == {4}
    assert full(texts[0])[0]["exit_layer"] == 4


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"operatingpoint": "exact"}, "takes no 'operatingpoint'. Did you mean 'operating_point'"),
        ({"layer_budgett": 4}, "takes no 'layer_budgett'. It takes"),
        ({"return_overflowing_tokens": True}, "takes no 'return_overflowing_tokens'"),
        ({"return_tensors": "np"}, "takes no 'return_tensors'"),
        ({"num_workers": 2}, "num_workers is for batches"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(saved, option, words):
    with pytest.raises(ee.EarlyExitError, match=words):
        ee.pipeline(model=str(saved))(["w5"], **option)
    with pytest.raises(ee.EarlyExitError, match=words):
        ee.pipeline(model=str(saved), **option)(["w5"])


def test_what_the_tokenizer_takes_reaches_it(saved):
    pipe = ee.pipeline(model=str(saved))
    cut = pipe(["w5 w6 w7 w8"], truncation=True, max_length=4)
    assert cut[0]["score"] == pytest.approx(pipe(["w5 w6"])[0]["score"], abs=1e-6)


def test_tables_of_texts_are_rows_and_ids_are_refused(saved, random_texts, tokenizer):
    texts, pipe = random_texts(4), ee.pipeline(model=str(saved))
    expected = pipe(texts)
    for rows in ({"text": texts}, pd.DataFrame({"text": texts, "label": 0}), Dataset.from_dict({"text": texts})):
        assert pipe(rows) == expected
    pairs = [{"text": text, "text_pair": "w5"} for text in texts]
    assert pipe([(text, "w5") for text in texts]) == pipe(pairs) != expected
    with pytest.raises(ee.EarlyExitError, match="takes texts, not token ids"):
        pipe(tokenizer(texts))
    for row in (None, 5, {"text": "w5", "label": 1}, {"text": ["w5", "w6"], "text_pair": "w7"}, ["w5", "w6", "w7"]):
        with pytest.raises(ee.EarlyExitError, match=r"A row is|column"):
            pipe([row])


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [("multi_label_classification", 3), ("regression", 1), ("regression", 3), (None, 1), (None, 3)],
)
def test_scores_through_the_engine_are_made_as_the_stock_pipeline_makes_them(
    tiny_model, tokenizer, random_texts, problem_type, labels
):
    model, texts = tiny_model(problem_type=problem_type, num_labels=labels), random_texts(4)
    pipe = ee.pipeline(model=model, tokenizer=tokenizer, top_k=None)
    for options in ({}, {"function_to_apply": "none"}, {"function_to_apply": "softmax"}):
        for one, stock in zip(pipe(texts, **options), pipe(texts, batch_size=2, **options), strict=True):
            assert [label["label"] for label in one] == [label["label"] for label in stock]
            assert [label["score"] for label in one] == pytest.approx([label["score"] for label in stock], abs=1e-5)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_an_answer_that_is_no_number_is_an_error(tiny_model, tokenizer, batch_size):
    model = tiny_model()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[6] = float("nan")
    with pytest.raises(ee.EarlyExitError, match="not finite"):
        list(ee.pipeline(model=model, tokenizer=tokenizer)(["w6"], batch_size=batch_size))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_folder_is_a_short_error_that_names_it(saved, tmp_path, file):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(ee.EarlyExitError, match=str(folder)) as caught:
        ee.pipeline(model=str(folder))
    assert type(caught.value) is CheckpointError
    assert len(str(caught.value)) < 700


def test_wrapped_models_serve_and_exported_ones_are_not_called_unsupported(tiny_model, tokenizer, tmp_path, capfd):
    model = tiny_model()
    expected = ee.pipeline(model=model, tokenizer=tokenizer)(["w5 w6"])
    compiled = torch.compile(model, backend="eager")
    assert ee.pipeline(model=compiled, tokenizer=tokenizer)(["w5 w6"]) == expected
    ee.export_onnx(compiled, tmp_path / "onnx", forms=["layers"])
    exported = ee.OnnxClassifier.from_pretrained(tmp_path / "onnx")
    capfd.readouterr()
    answer = ee.pipeline(model=exported, tokenizer=tokenizer)(["w5 w6"])
    assert answer[0]["label"] == expected[0]["label"]
    assert "not supported" not in "".join(capfd.readouterr())

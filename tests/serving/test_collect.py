"""A trace is what a full pass says, in the order of the rows."""

import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.modeling.fingerprint import model_fingerprint


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(exit_layers=[1, 3, 4])


@pytest.fixture(scope="module")
def rows(random_texts):
    return random_texts(37, longest=30)


@pytest.fixture(scope="module")
def labels():
    return [number % 3 for number in range(37)]


@pytest.mark.parametrize("budget", [1, 100, 4096])
def test_a_trace_is_the_full_pass_in_the_original_order(model, tokenizer, rows, labels, budget):
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, max_batch_tokens=budget, progress=False)
    assert trace.logits.shape == (37, 3, 3)
    assert trace.labels.tolist() == labels
    assert trace.exit_layers == (1, 3, 4)
    with torch.inference_mode():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt"), early_exit=False).exit_logits for text in rows])
    assert (trace.logits - alone).abs().max() <= 1e-5
    assert (alone[1:] - alone[:-1]).abs().amax((1, 2)).min() > 1e-3  # another order would show


def test_a_policy_on_the_model_is_not_asked(tiny_model, tokenizer, rows, labels):
    model = tiny_model()
    before = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.0, 0.0, 0.0]))
    after = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    assert torch.equal(before.logits, after.logits)


def test_the_model_is_in_eval_mode_while_collecting_and_back_afterwards(tiny_model, tokenizer, rows, labels):
    model = tiny_model()
    first = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    second = ee.collect_trace(model.train(), rows, tokenizer=tokenizer, labels=labels, progress=False)
    assert torch.equal(first.logits, second.logits)
    assert model.training
    assert not second.logits.requires_grad


def test_batches_keep_the_token_budget(model, tokenizer, rows, labels):
    sizes = []
    hook = model.bert.embeddings.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2]))
    ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, max_batch_tokens=64, progress=False)
    hook.remove()
    assert all(batch * width <= 64 for batch, width in sizes)
    assert sum(batch for batch, _ in sizes) == 37
    assert max(batch for batch, _ in sizes) > 1


def test_texts_pairs_and_data_sets_give_the_same_trace(model, tokenizer, rows, labels):
    pairs = list(zip(rows, reversed(rows), strict=True))
    texts = Dataset.from_dict({"premise": rows, "hypothesis": rows[::-1], "label": labels})
    encoded = texts.map(lambda row: tokenizer(row["premise"], row["hypothesis"])).rename_column("label", "labels")
    collected = [
        ee.collect_trace(model, pairs, tokenizer=tokenizer, labels=labels, progress=False),
        ee.collect_trace(model, texts, tokenizer=tokenizer, progress=False),
        ee.collect_trace(model, encoded, progress=False),
    ]
    assert all(torch.equal(trace.logits, collected[0].logits) for trace in collected)
    assert all(trace.labels.tolist() == labels for trace in collected)


def test_labels_given_win_over_the_column(model, tokenizer, rows, labels):
    data = Dataset.from_dict({"text": rows, "label": labels})
    trace = ee.collect_trace(model, data, tokenizer=tokenizer, labels=[0] * 37, progress=False)
    assert trace.labels.tolist() == [0] * 37


def test_missing_labels_and_tokenizers_are_named(model, tokenizer, rows, labels):
    with pytest.raises(UsageError, match=r"No labels: pass labels=\[...\]"):
        ee.collect_trace(model, rows, tokenizer=tokenizer, progress=False)
    with pytest.raises(UsageError, match="No labels"):
        ee.collect_trace(model, Dataset.from_dict({"text": rows}), tokenizer=tokenizer, progress=False)
    with pytest.raises(UsageError, match="need a tokenizer"):
        ee.collect_trace(model, rows, labels=labels, progress=False)
    with pytest.raises(DataError, match="37 rows and 36 labels"):
        ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels[1:], progress=False)
    with pytest.raises(DataError, match="at least one row"):
        ee.collect_trace(model, [], tokenizer=tokenizer, labels=[], progress=False)


@pytest.mark.parametrize("wrong", [3, -1])
def test_labels_out_of_range_are_refused(model, tokenizer, rows, labels, wrong):
    with pytest.raises(DataError, match="expected 0 to 2"):
        ee.collect_trace(model, rows, tokenizer=tokenizer, labels=[wrong, *labels[1:]], progress=False)


def test_the_trace_says_where_it_comes_from(model, tokenizer, rows, labels):
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, split="train", progress=False)
    assert (trace.split, trace.problem_type) == ("train", "single_label_classification")
    assert trace.fingerprint == model_fingerprint(model)
    assert trace.meta["dtype"] == "float32"
    assert set(trace.meta["versions"]) == {"hf_earlyexit", "torch", "transformers"}


def test_costs_and_problem_types_come_from_the_config(tiny_model, tokenizer, rows):
    model = tiny_model(problem_type="multi_label_classification", exit_cost=[0.5, 2, 3, 4])
    truth = [[1.0, 0.0, 1.0]] * 37
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=truth, progress=False)
    assert trace.problem_type == "multi_label_classification"
    assert trace.costs == (0.5, 2.0, 3.0, 4.0)
    values = ee.collect_trace(tiny_model(num_labels=1), rows, tokenizer=tokenizer, labels=[0.5] * 37, progress=False)
    assert values.problem_type == "regression"


def test_half_precision_models_give_float32_traces(tiny_model, tokenizer, rows, labels):
    model = tiny_model().to(torch.bfloat16)
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    assert trace.logits.dtype == torch.float32
    assert trace.meta["dtype"] == "bfloat16"


def test_the_fingerprint_changes_with_the_weights_and_not_with_the_policy(tiny_model, tmp_path):
    model = tiny_model()
    start = model_fingerprint(model)
    assert len(start) == 16
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.5] * 3))
    assert model_fingerprint(model) == start
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == start
    seen = {start}
    layer = model.bert.encoder.layer[0].output.dense
    heads = (model.exit_heads["2"].classifier.bias, model.exit_heads["3"].classifier.weight, model.classifier.weight)
    for weight in (*heads, layer.weight):
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        seen.add(model_fingerprint(model))
    assert len(seen) == 5
    half = model.to(torch.bfloat16)
    assert model_fingerprint(half) == model_fingerprint(half.to(torch.float32))


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_calibrated_layers_are_the_served_layers(tiny_model, tokenizer, random_texts, share):
    model, texts = tiny_model(), random_texts(300)
    full = ee.collect_trace(model, texts, tokenizer=tokenizer, labels=[0] * 300, progress=False)
    trace = ee.ExitTrace(**{**vars(full), "labels": full.logits[:, -1].argmax(-1)})
    result = ee.calibrate(
        trace, policy="confidence", target=ee.LayerBudget(4 - 3 * share), metric="accuracy", keep_weak_exits=True
    )
    model.set_exit_policy(result)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        served = model(**encoded)
    assert served.exit_layer.float().mean().item() == pytest.approx(result.mean_layers, abs=0.02)
    accuracy = (served.logits.argmax(-1) == trace.labels).float().mean().item()
    assert accuracy == pytest.approx(result.quality, abs=0.01)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_rows_without_labels_are_judged_by_the_full_model(tiny_model, tmp_path, problem_type):
    options = {"num_labels": 1} if problem_type == "regression" else {}
    model = tiny_model(problem_type=problem_type, **options).eval()
    ids = [{"input_ids": [2, 5 + place % 15, 6 + place % 7, 3]} for place in range(60)]
    trace = ee.collect_trace(model, ids, labelled=False, progress=False)
    full = ee.predict(model, ids, early_exit=False).logits
    expected = {
        "single_label_classification": full.argmax(-1),
        "multi_label_classification": (full > 0).float(),
        "regression": full,
    }[problem_type]
    assert torch.allclose(trace.labels.float(), expected.float(), atol=1e-5)
    assert not trace.labelled
    assert trace.problem_type == problem_type
    trace.save(tmp_path / "trace.safetensors")
    assert not ee.ExitTrace.load(tmp_path / "trace.safetensors").labelled
    assert float(trace.quality[:, -1].mean()) == (0.0 if problem_type == "regression" else 1.0)
    result = ee.calibrate(trace, "patience", options={"tolerance": 0.1} if problem_type == "regression" else None)
    assert any("no labels" in note for note in result.notes)


def test_labels_that_are_there_are_not_read(tiny_model):
    model = tiny_model().eval()
    rows = Dataset.from_dict({"input_ids": [[2, 5 + n % 9, 3] for n in range(20)], "label": ["?"] * 20})
    assert not ee.collect_trace(model, rows, labelled=False, progress=False).labelled
    with pytest.raises(UsageError, match="contradicts"):
        ee.collect_trace(model, rows, labels=[0] * 20, labelled=False)
    with pytest.raises(DataError, match="no rows"):
        ee.collect_trace(model, [], labelled=False)

"""The Trainer: every exit learns and is reported, nothing else changes, faults have names."""

import copy
import inspect
import json

import datasets
import evaluate
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, TrainingError, UnknownNameError

MULTI = "multi_label_classification"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def full_pass(model, data, tokenizer):
    batch = tokenizer.pad(data.select_columns(["input_ids", "attention_mask"])[:], return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(**batch, early_exit=False)


# --- metrics ------------------------------------------------------------------------------------------------------------


def test_evaluation_logs_the_accuracy_of_every_exit(trainer, tiny_model, tokenizer, rows):
    model, data = tiny_model(exit_layers=[1, 3, 4]), rows(20, seed=1)
    metrics = trainer(model).evaluate()
    answers = full_pass(model, data, tokenizer).exit_logits.argmax(-1)
    truth = torch.tensor(data["labels"][:])
    by_hand = {
        f"eval_exit_{layer}_accuracy": (answers[:, i] == truth).float().mean().item() for i, layer in enumerate((1, 3, 4))
    }
    assert {name: value for name, value in metrics.items() if "_exit_" in name} == pytest.approx(by_hand)
    assert len(set(by_hand.values())) > 1


def test_metrics_of_exits_are_logged_while_training_and_can_choose_the_best_model(trainer, arguments):
    class Keep(TrainerCallback):
        logs: list

    kept = Keep()
    kept.logs = []
    kept.on_log = lambda args, state, control, logs=None, **kwargs: kept.logs.append(dict(logs))
    kept.on_evaluate = lambda args, state, control, metrics=None, **kwargs: kept.logs.append({"seen": set(metrics)})
    args = arguments(
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="exit_2_accuracy",
    )
    run = trainer(args=args, callbacks=[kept])
    run.train()
    history = [log for log in run.state.log_history if "eval_exit_2_accuracy" in log]
    assert len(history) == 3
    assert run.state.best_metric == max(log["eval_exit_2_accuracy"] for log in history)
    assert any("eval_exit_2_accuracy" in log for log in kept.logs)
    assert any({"eval_exit_1_accuracy", "eval_loss"} <= log.get("seen", set()) for log in kept.logs)
    assert len([log for log in run.state.log_history if "loss" in log and "grad_norm" in log]) == 3


@pytest.mark.parametrize("read", ["attributes", "unpacked", "indexed"])
def test_compute_metrics_gets_plain_logits_and_labels(trainer, tiny_model, tokenizer, rows, read):
    model, seen = tiny_model(), {}

    def compute_metrics(prediction):
        if read == "attributes":
            logits, labels = prediction.predictions, prediction.label_ids
        elif read == "unpacked":
            logits, labels = prediction
        else:
            logits, labels = prediction[0], prediction[1]
        seen.update(logits=logits, labels=labels)
        return {"accuracy": float((logits.argmax(-1) == labels).mean())}

    metrics = trainer(model, compute_metrics=compute_metrics).evaluate()
    expected = full_pass(model, rows(20, seed=1), tokenizer).logits
    assert isinstance(seen["logits"], np.ndarray)
    assert seen["logits"].shape == (20, 3)
    assert np.abs(seen["logits"] - expected.numpy()).max() <= 1e-5
    assert seen["labels"].tolist() == rows(20, seed=1)["labels"][:]
    assert metrics["eval_accuracy"] == metrics["eval_exit_4_accuracy"]


class OfflineAccuracy(evaluate.Metric):
    """An `evaluate` metric that needs no download."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="accuracy", citation="", features=features)

    def _compute(self, predictions, references):
        return {"share": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def test_metrics_of_the_evaluate_library_work(trainer, tmp_path):
    metric = OfflineAccuracy(cache_dir=str(tmp_path))

    def compute_metrics(prediction):
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    metrics = trainer(compute_metrics=compute_metrics).evaluate()
    assert metrics["eval_share"] == pytest.approx(metrics["eval_exit_4_accuracy"])
    assert 0 < metrics["eval_share"] < 1


def test_metrics_batch_by_batch_get_plain_logits_too(trainer, arguments):
    shapes = []

    def compute_metrics(prediction, compute_result):
        shapes.append(tuple(prediction.predictions.shape[1:]))
        return {"batches": len(shapes)} if compute_result else {}

    args = arguments(batch_eval_metrics=True, per_device_eval_batch_size=8)
    metrics = trainer(args=args, compute_metrics=compute_metrics).evaluate()
    assert shapes == [(3,)] * 3
    assert metrics["eval_batches"] == 3


def test_preprocess_logits_for_metrics_gets_and_gives_plain_logits(trainer):
    shapes = []

    def preprocess(logits, labels):
        shapes.append((tuple(logits.shape[1:]), tuple(labels.shape[1:])))
        return logits.argmax(-1)

    def compute_metrics(prediction):
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    metrics = trainer(preprocess_logits_for_metrics=preprocess, compute_metrics=compute_metrics).evaluate()
    assert set(shapes) == {((3,), ())}
    assert metrics["eval_accuracy"] == metrics["eval_exit_4_accuracy"]


def test_predict_returns_plain_logits_also_without_labels(trainer, tiny_model, tokenizer, rows):
    model = tiny_model()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.0, 0.0, 0.0]))  # is not asked
    run = trainer(model)
    expected = full_pass(model, rows(20, seed=1), tokenizer).logits.numpy()
    labelled, unlabelled = run.predict(rows(20, seed=1)), run.predict(rows(20, seed=1, labels=None))
    for output in (labelled, unlabelled):
        assert np.abs(output.predictions - expected).max() <= 1e-5
    assert "test_exit_1_accuracy" in labelled.metrics
    assert unlabelled.label_ids is None


def test_the_exit_metric_can_be_chosen(trainer, arguments):
    metrics = trainer(args=arguments(exit_metric="matthews")).evaluate()
    assert {f"eval_exit_{layer}_matthews" for layer in (1, 2, 3, 4)} <= set(metrics)
    assert not any(name.endswith("_accuracy") for name in metrics)


@pytest.mark.parametrize(
    ("fields", "labels", "metric"),
    [({"problem_type": MULTI}, [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], "f1"), ({"num_labels": 1}, [0.25, -1.5], "spearman")],
    ids=["multi", "regression"],
)
def test_other_problem_types_train_and_are_judged_by_their_own_metric(trainer, tiny_model, rows, fields, labels, metric):
    data = rows(32, labels=labels * 16)
    run = trainer(tiny_model(**fields), train_dataset=data, eval_dataset=data)
    before = state(run.model)
    run.train()
    assert not same(before, state(run.model))
    assert {f"eval_exit_{layer}_{metric}" for layer in (1, 2, 3, 4)} <= set(run.evaluate())


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["weighted", "distillation", "two-stage"])
def test_accumulating_gradients_changes_nothing(trainer, arguments, tiny_model, objective):
    def step(batch, accumulate):
        args = arguments(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
            objective=objective,
        )
        run = trainer(tiny_model(**NO_DROPOUT), args)
        run.train()
        return state(run.model)

    start, whole, parts = state(tiny_model(**NO_DROPOUT)), step(32, 1), step(8, 4)
    moved = {name: (whole[name] - start[name]).abs().max().item() for name in start}
    assert max(moved.values()) > 1e-2
    assert all((whole[name] - parts[name]).abs().max() <= 1e-4 * max(moved.values()) for name in start)


def test_every_exit_and_layer_learns(trainer, tiny_model):
    run = trainer(tiny_model())
    before = state(run.model)
    run.train()
    after = state(run.model)
    still = [name for name in before if torch.equal(before[name], after[name]) and "position_ids" not in name]
    assert still == []


def test_training_lowers_the_loss_of_every_exit(trainer, arguments, tiny_model, rows, tokenizer):
    data = rows(48)
    args = arguments(max_steps=40, learning_rate=5e-3, per_device_train_batch_size=16)
    run = trainer(tiny_model(**NO_DROPOUT), args, train_dataset=data, eval_dataset=data)
    truth = torch.tensor(data["labels"][:])

    def losses():
        logits = full_pass(run.model, data, tokenizer).exit_logits
        return torch.stack([torch.nn.functional.cross_entropy(logits[:, index], truth) for index in range(4)])

    before = losses()
    run.train()
    assert (losses() < 0.6 * before).all()


def test_two_stage_changes_the_heads_and_nothing_else(trainer, arguments, tiny_model, tokenizer, rows):
    model = tiny_model(exit_head="linear")
    before, answers = state(model), full_pass(model, rows(20, seed=1), tokenizer)
    run = trainer(model, arguments(objective="two-stage", weight_decay=0.1))
    run.train()
    after, now = state(model), full_pass(model, rows(20, seed=1), tokenizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("exit_heads.")}
    assert torch.equal(answers.logits, now.logits)
    assert not torch.equal(answers.exit_logits[:, 0], now.exit_logits[:, 0])


def test_two_stage_teaches_without_dropout_in_the_frozen_parts(trainer, arguments):
    run = trainer(args=arguments(objective="two-stage"))
    modes = []
    run.model.bert.encoder.layer[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    run.model.exit_heads["1"].register_forward_hook(lambda module, *_: modes.append(module.training))
    run.train()
    assert modes == [False, True] * 3


def test_two_stage_without_early_exits_is_refused(trainer, arguments, tiny_model):
    with pytest.raises(TrainingError, match="exit"):
        trainer(tiny_model(exit_layers=[4]), arguments(objective="two-stage")).train()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_exit_and_step(trainer, value):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.exit_heads["2"].classifier.bias[0] = value

    run = trainer(callbacks=[Poison()])
    with pytest.raises(TrainingError, match="loss of the exit after layer 2 is nan at step 2; lower") as caught:
        run.train()
    assert caught.value.field == "exit_2_loss"


@pytest.mark.parametrize("objective", ["weighted", "distillation", "two-stage"])
def test_resuming_gives_the_straight_runs_weights_to_the_bit(trainer, arguments, tiny_model, tmp_path, objective):
    def run(folder, model_seed=0):
        args = arguments(
            output_dir=str(tmp_path / folder),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            objective=objective,
            lr_scheduler_type="linear",
        )
        return trainer(tiny_model(seed=model_seed), args)

    straight = run("straight")
    straight.train()
    torch.manual_seed(99)
    resumed = run("resumed", model_seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert same(state(straight.model), state(resumed.model))
    halfway = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "straight" / "checkpoint-3")
    assert not same(state(halfway), state(resumed.model))


def test_saved_checkpoints_are_models_with_exits(trainer, tmp_path):
    run = trainer()
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["early_exit_version"] == "1.0"
    assert same(state(ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "model")), state(run.model))


def test_the_stock_trainer_trains_and_evaluates_the_model(trainer, arguments, tiny_model):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    run = trainer(tiny_model(), arguments(TrainingArguments), cls=Trainer, compute_metrics=compute_metrics)
    before = state(run.model)
    run.train()
    after = state(run.model)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.startswith("exit_heads."))
    assert "eval_accuracy" in run.evaluate()
    assert seen[0].shape == (20, 3)


def test_the_stock_trainer_accumulates_the_models_loss_rightly(trainer, arguments, tiny_model):
    def grad_norm(batch, accumulate):
        args = arguments(
            TrainingArguments, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1
        )
        run = trainer(tiny_model(**NO_DROPOUT), args, cls=Trainer)
        run.train()
        return run.state.log_history[0]["grad_norm"]

    assert grad_norm(32, 1) == pytest.approx(grad_norm(8, 4), rel=1e-4)


# --- faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("wrong", [3, -1, 10**6])
def test_a_label_out_of_range_names_its_row(trainer, rows, which, wrong):
    labels = [0] * 16
    labels[11] = wrong
    with pytest.raises(DataError, match=f"Row 11 of {which} has label {wrong}; expected 0 to 2") as caught:
        trainer(**{which: rows(16, labels=labels)})
    assert caught.value.value == wrong


def test_labels_that_are_all_ignored_are_refused(trainer, rows):
    with pytest.raises(DataError, match="Every label of train_dataset is -100"):
        trainer(train_dataset=rows(8, labels=[-100] * 8))


def test_a_batch_of_ignored_rows_among_others_is_left_out(trainer, arguments, rows):
    data = rows(8, labels=[0, 1, 2, 0, -100, -100, -100, -100])
    args = arguments(
        per_device_train_batch_size=4, per_device_eval_batch_size=4, train_sampling_strategy="sequential", max_steps=2
    )
    run = trainer(args=args, train_dataset=data, eval_dataset=data)
    run.train()
    assert all(torch.isfinite(value).all() for value in state(run.model).values())
    assert np.isfinite(run.evaluate()["eval_loss"])


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_data_set_without_rows_is_refused_by_name(trainer, rows, which):
    with pytest.raises(DataError, match=f"{which} has no rows") as caught:
        trainer(**{which: rows(8).select([])})
    assert caught.value.field == which


def test_every_part_of_a_dict_of_eval_sets_is_checked(trainer, rows):
    with pytest.raises(DataError, match="Row 0 of eval_dataset has label 7"):
        trainer(eval_dataset={"good": rows(8), "bad": rows(8, labels=[7] * 8)})


def test_several_eval_sets_are_reported_apart(trainer, rows):
    metrics = trainer(eval_dataset={"one": rows(8), "two": rows(8, seed=2)}).evaluate()
    assert {"eval_one_exit_1_accuracy", "eval_two_exit_4_accuracy"} <= set(metrics)


def test_whole_number_labels_with_one_output_are_refused(trainer, tiny_model, rows):
    with pytest.raises(DataError, match=r"one output: set num_labels.*problem_type='regression'"):
        trainer(tiny_model(num_labels=1), train_dataset=rows(8))


def test_whole_numbers_are_values_where_the_config_says_so(trainer, tiny_model, rows):
    data = rows(16)
    run = trainer(tiny_model(num_labels=1, problem_type="regression"), train_dataset=data, eval_dataset=data)
    run.train()
    assert "eval_exit_1_spearman" in run.evaluate()


def test_many_labels_as_whole_numbers_are_refused_where_the_config_does_not_say_so(trainer, rows):
    with pytest.raises(DataError, match=f"{MULTI}.*float"):
        trainer(train_dataset=rows(8, labels=[[1, 0, 1]] * 8))


def test_single_values_for_a_model_with_classes_are_refused(trainer, rows):
    with pytest.raises(DataError, match="labels"):
        trainer(train_dataset=rows(8, labels=[0.0, 1.0] * 4))


def test_values_that_are_not_finite_name_their_row(trainer, tiny_model, rows):
    with pytest.raises(DataError, match="Row 2 of train_dataset has a label that is not finite"):
        trainer(tiny_model(num_labels=1), train_dataset=rows(4, labels=[0.0, 1.0, float("nan"), 2.0]))


def test_lists_of_rows_are_checked_too(trainer, rows):
    examples = list(rows(8, labels=[0] * 6 + [5, 0]))
    with pytest.raises(DataError, match="Row 6 of train_dataset has label 5"):
        trainer(train_dataset=examples)


def test_a_misspelt_objective_or_metric_comes_with_a_suggestion(arguments):
    with pytest.raises(UnknownNameError, match=r"Unknown objective 'destillation'. Did you mean 'distillation'"):
        arguments(objective="destillation")
    with pytest.raises(UnknownNameError, match=r"Unknown exit metric 'acuracy'. Did you mean 'accuracy'"):
        arguments(exit_metric="acuracy")


@pytest.mark.parametrize(
    "options",
    [{"temprature": 2.0}, "{not json", {"weights": "quadratic"}, {"weights": [-1, 1, 1, 1]}, {"temperature": 0}, "[1]", 7],
)
def test_objective_options_that_cannot_work_are_refused(arguments, options):
    with pytest.raises(TrainingError):
        arguments(objective="distillation", objective_options=options)


def test_objective_options_may_be_json(arguments):
    args = arguments(objective="distillation", objective_options='{"temperature": 2.0, "weights": [1, 1, 1, 3]}')
    objective = args.make_objective()
    assert objective.temperature == 2.0
    assert objective.exit_weights((1, 2, 3, 4)).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0.5])


def test_a_wrong_number_of_weights_is_refused_before_training(trainer, arguments):
    with pytest.raises(TrainingError, match="weights has 2 numbers for 4 exits"):
        trainer(args=arguments(objective_options={"weights": [1, 2]})).train()


def test_stock_arguments_are_refused_with_the_class_to_use(trainer, arguments):
    with pytest.raises(TrainingError, match="args is TrainingArguments; expected EarlyExitTrainingArguments"):
        trainer(args=arguments(TrainingArguments))


def test_texts_are_cut_for_calibration_and_serving_as_for_training(trainer, tiny_model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 8
    texts = [" ".join(f"w{(7 * row + place) % 90}" for place in range(20)) for row in range(24)]
    encoded = tokenizer(texts, truncation=True)
    labels = [row % 3 for row in range(24)]
    cut = datasets.Dataset.from_dict({**encoded, "labels": labels})
    run = trainer(tiny_model(), train_dataset=cut, eval_dataset=cut, processing_class=tokenizer)
    run.train()
    run.save_model(tmp_path / "model")

    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.model_max_length == 8
    trace = ee.collect_trace(model, texts, labels=labels, tokenizer=saved, progress=False)
    of_cut_rows = ee.collect_trace(model, cut, progress=False)
    assert torch.equal(trace.logits, of_cut_rows.logits)
    served = ee.predict(model, texts, tokenizer=saved, early_exit=False)
    torch.testing.assert_close(served.logits, trace.logits[:, -1], atol=1e-5, rtol=1e-5)
    saved.model_max_length = 32
    longer = ee.predict(model, texts, tokenizer=saved, early_exit=False)
    assert (longer.logits - served.logits).abs().max() > 1e-3  # the length does matter to these rows


def test_outputs_that_are_never_kept_may_be_ignored(trainer, arguments, rows):
    def figures(metrics):
        return {name: value for name, value in metrics.items() if "_exit_" in name or name.endswith("loss")}

    kept, keys = trainer(args=arguments(eval_strategy="steps", eval_steps=3)), ["hidden_states", "cache"]
    kept.train(None, None, keys)
    logged = next(log for log in kept.state.log_history if "eval_loss" in log)
    assert figures(logged) == figures(kept.evaluate()) == figures(kept.evaluate(ignore_keys=keys)) != {}
    assert kept.predict(rows(5), keys).predictions.shape == (5, 3)


@pytest.mark.parametrize("name", ["loss", "logits", "exit_logits", "exit_gates"])
def test_outputs_that_figures_are_made_of_cannot_be_ignored(trainer, rows, name):
    def refused(argument):
        return pytest.raises(TrainingError, match=rf"{argument}=\['{name}'\] cannot be used here")

    kept = trainer()
    with refused("ignore_keys_for_eval"):
        kept.train(ignore_keys_for_eval=["attentions", name])
    assert kept.state.global_step == 0, "it is refused before the first step"
    with refused("ignore_keys"):
        kept.evaluate(ignore_keys=[name])
    with refused("ignore_keys"):
        kept.predict(rows(5), ignore_keys=[name])


def test_train_takes_every_argument_of_transformers_trainer():
    for method in ("train", "evaluate", "predict"):
        taken = inspect.signature(getattr(ee.EarlyExitTrainer, method)).parameters
        assert "kwargs" in taken or list(taken) == list(inspect.signature(getattr(Trainer, method)).parameters)

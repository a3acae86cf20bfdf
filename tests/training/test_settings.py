"""Every argument of transformers' Trainer and TrainingArguments works, or is refused by name."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, EarlyExitError, TrainingError, UsageError
from tests.conftest import SHAPE

MULTI = "multi_label_classification"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TWO = {"num_labels": 2, "id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- the lists ----------------------------------------------------------------------------------------------------------

# What the Trainer itself does with a model's steps, whatever the model is: nothing of ours stands in between.
LOOP = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules max_grad_norm tf32 use_cache torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy
    eval_steps eval_delay per_device_eval_batch_size eval_on_start save_strategy save_steps save_on_each_node
    save_total_limit enable_jit_checkpoint greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu accelerator_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order train_sampling_strategy length_column_name ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout
    debug skip_memory_metrics do_train do_eval do_predict local_rank hub_token hub_private_repo hub_model_id
    hub_revision torch_compile_backend torch_compile_mode activation_checkpointing_kwargs
    gradient_checkpointing_kwargs liger_kernel_config
"""
# Where our code has a part in it, and the test that shows it.
BEST = "test_metrics_of_exits_are_logged_while_training_and_can_choose_the_best_model"
OURS = {
    "gradient_accumulation_steps": "test_trainer.py::test_accumulating_gradients_changes_nothing",
    "average_tokens_across_devices": "::test_a_loss_of_ones_own_accumulates_as_in_the_stock_trainer",
    "label_smoothing_factor": "::test_label_smoothing_is_that_of_the_stock_trainer_at_every_exit",
    "bf16": "::test_options_of_the_step_work",
    "fp16": "::test_half_precision_works_on_a_gpu",
    "bf16_full_eval": "::test_options_of_evaluations_give_the_same_metrics",
    "fp16_full_eval": "::test_options_of_evaluations_give_the_same_metrics",
    "activation_checkpointing": "::test_recomputing_activations_changes_nothing",
    "gradient_checkpointing": "::test_recomputing_activations_changes_nothing",
    "torch_compile": "::test_a_compiled_step_learns_the_same",
    "use_liger_kernel": "::test_liger_and_sharded_sequences_are_refused_by_name",
    "parallelism_config": "::test_liger_and_sharded_sequences_are_refused_by_name",
    "neftune_noise_alpha": "::test_noise_in_the_embeddings_reaches_the_exits",
    "logging_nan_inf_filter": "test_trainer.py::test_a_loss_that_is_not_finite_names_exit_and_step",
    "prediction_loss_only": "::test_evaluations_may_give_the_loss_alone",
    "eval_do_concat_batches": "::test_batches_that_are_not_joined_give_the_same_metrics",
    "eval_use_gather_object": "::test_options_of_evaluations_give_the_same_metrics",
    "eval_accumulation_steps": "::test_options_of_evaluations_give_the_same_metrics",
    "include_for_metrics": "::test_metrics_may_have_inputs_and_losses",
    "batch_eval_metrics": "test_trainer.py::test_metrics_batch_by_batch_get_plain_logits_too",
    "save_only_model": "::test_models_saved_alone_load_and_cannot_be_resumed",
    "push_to_hub": "hub/test_round_trip.py",
    "hub_strategy": "hub/test_round_trip.py",
    "hub_always_push": "hub/test_round_trip.py",
    "load_best_model_at_end": f"test_trainer.py::{BEST}",
    "metric_for_best_model": f"test_trainer.py::{BEST}",
    "remove_unused_columns": "::test_columns_that_the_model_does_not_read_change_nothing",
    "label_names": "::test_the_column_of_labels_may_have_any_name",
    "fsdp": "::test_a_model_split_over_devices_is_refused_by_name",
    "fsdp_config": "::test_a_model_split_over_devices_is_refused_by_name",  # nothing without fsdp
    "deepspeed": "::test_a_model_split_over_devices_is_refused_by_name",
    "ddp_find_unused_parameters": "test_distributed.py",
    "ddp_static_graph": "test_distributed.py",
    "ddp_backend": "test_distributed.py",
    "resume_from_checkpoint": "test_checkpoints.py",
}


def test_every_training_argument_is_known_here():
    """A new argument of transformers needs a look: does it reach the exits? Then it goes into one of the lists above."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    lists = [*LOOP.split(), *OURS]
    assert len(lists) == len(set(lists))
    assert fields - set(lists) == set()


def test_every_test_that_the_table_names_is_there():
    for argument, place in OURS.items():
        file, _, name = place.partition("::")
        here = Path(__file__)
        path = here if not file else here.parent.parent / file if "/" in file else here.parent / file
        assert path.is_file(), argument
        assert not name or f"def {name}(" in path.read_text(), argument


def test_every_argument_of_the_trainer_is_known_here():
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert names == {
        *("model", "args", "train_dataset", "eval_dataset", "processing_class", "callbacks"),  # test_trainer.py
        *("compute_metrics", "preprocess_logits_for_metrics"),  # test_trainer.py
        *("data_collator", "model_init", "compute_loss_func", "optimizers", "optimizer_cls_and_kwargs"),  # here
    }


# --- arguments of the Trainer -------------------------------------------------------------------------------------------


def weighted(outputs, labels, num_items_in_batch=None):
    """A loss in which class 0 counts ten times, scaled as the documentation asks for."""
    losses = functional.cross_entropy(outputs["logits"], labels, torch.tensor([10.0, 1.0, 1.0]), reduction="none")
    return losses.sum() / num_items_in_batch if num_items_in_batch is not None else losses.mean()


def test_a_loss_of_ones_own_is_asked_at_every_exit(trainer, arguments, tiny_model, rows):
    seen = []

    def watched(outputs, labels, num_items_in_batch=None):
        seen.append(outputs.logits.detach())
        return weighted(outputs, labels, num_items_in_batch)

    model, data = tiny_model(**NO_DROPOUT), rows(8)
    args = arguments(max_steps=1, learning_rate=0.0, objective_options={"weights": [1, 2, 3, 4]})
    run = trainer(model, args, train_dataset=data, compute_loss_func=watched)
    loss = run.train().training_loss
    batch = run.data_collator([{name: row[name] for name in ("input_ids", "attention_mask")} for row in data])
    with torch.inference_mode():
        exits = model.eval()(**batch, early_exit=False).exit_logits
    truth = torch.tensor(data["labels"][:])
    by_hand = [weighted({"logits": exits[:, index]}, truth) for index in range(4)]
    assert loss == pytest.approx(
        sum(weight / 10 * float(value) for weight, value in zip((1, 2, 3, 4), by_hand, strict=True))
    )
    assert len(seen) == 4
    assert len({float(logits.sum()) for logits in seen}) == 4


@pytest.mark.parametrize("objective", ["weighted", "distillation", "two-stage"])
def test_a_loss_of_ones_own_accumulates_as_in_the_stock_trainer(trainer, arguments, tiny_model, objective):
    def step(batch, accumulate):
        args = arguments(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            objective=objective,
        )
        run = trainer(tiny_model(**NO_DROPOUT), args, compute_loss_func=weighted)
        run.train()
        return state(run.model)

    start, whole, parts = state(tiny_model(**NO_DROPOUT)), step(32, 1), step(8, 4)
    moved = {name: (whole[name] - start[name]).abs().max().item() for name in start}
    assert max(moved.values()) > 1e-2
    assert all((whole[name] - parts[name]).abs().max() <= 1e-4 * max(moved.values()) for name in start)


def test_a_loss_of_ones_own_judges_evaluations_too(trainer, rows, tiny_model):
    data = rows(20, seed=1)
    plain, own = trainer(tiny_model()).evaluate(), trainer(tiny_model(), compute_loss_func=weighted).evaluate()
    assert own["eval_loss"] > plain["eval_loss"] * 1.5
    assert own["eval_exit_1_accuracy"] == plain["eval_exit_1_accuracy"]
    assert len(data) == 20


@pytest.mark.parametrize("value", [None, 1.0, torch.zeros(3)])
def test_a_loss_of_ones_own_that_is_no_number_is_refused(trainer, value):
    with pytest.raises(TrainingError, match=r"compute_loss_func gave .*; expected a tensor of one number"):
        trainer(compute_loss_func=lambda *_, **__: value).train()


def test_label_smoothing_is_that_of_the_stock_trainer_at_every_exit(trainer, arguments, tiny_model, rows):
    def loss(cls, args, model):
        return trainer(model, args, cls=cls).evaluate()["eval_loss"]

    labels = [-100, *rows(19, seed=1)["labels"][:]]
    fields = {"label_smoothing_factor": 0.3, "per_device_eval_batch_size": 20}
    only_last = arguments(objective_options={"weights": [0, 0, 0, 1]}, **fields)
    data = {"eval_dataset": rows(20, labels=labels)}
    run = trainer(tiny_model(), only_last, **data)
    stock = trainer(tiny_model(), arguments(TrainingArguments, **fields), cls=Trainer, **data)
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    plain = trainer(tiny_model(), arguments(objective_options={"weights": [0, 0, 0, 1]}), **data)
    assert abs(plain.evaluate()["eval_loss"] - run.evaluate()["eval_loss"]) > 1e-2
    first = [
        trainer(tiny_model(), arguments(objective_options={"weights": [1, 0, 0, 0]}, **more), **data)
        for more in ({}, fields)
    ]
    assert abs(first[0].evaluate()["eval_loss"] - first[1].evaluate()["eval_loss"]) > 1e-2


@pytest.mark.parametrize(
    ("fields", "labels"),
    [({"problem_type": MULTI}, [[1.0, 0.0, 1.0]] * 8), ({}, [[1.0, 0.0, 1.0]] * 8), ({"num_labels": 1}, [0.5] * 8)],
)
def test_smoothing_what_are_no_classes_is_refused(trainer, arguments, tiny_model, rows, fields, labels):
    data = rows(8, labels=labels)
    with pytest.raises(
        TrainingError, match=r"label_smoothing_factor.* cannot be used here: it smooths class labels"
    ) as caught:
        trainer(tiny_model(**fields), arguments(label_smoothing_factor=0.1), train_dataset=data, eval_dataset=data)
    assert caught.value.field == "label_smoothing_factor"


def test_a_new_model_is_frozen_as_the_first_was(trainer, arguments, tiny_model):
    run = ee.EarlyExitTrainer(
        args=arguments(objective="two-stage"), model_init=lambda: tiny_model(), **{name: getattr(trainer(), name) for name in
        ("train_dataset", "eval_dataset", "processing_class")},
    )  # fmt: skip
    run.train()
    different = changed(state(tiny_model()), state(run.model))
    assert different == {name for name in state(run.model) if name.startswith("exit_heads.")}
    assert run.exit_model is run.model


def test_model_init_is_checked_as_a_model_is(trainer, arguments, rows):
    with pytest.raises(UsageError, match="has no exits"):
        ee.EarlyExitTrainer(args=arguments(), model_init=lambda: BertForSequenceClassification(BertConfig(**SHAPE)))


def test_an_optimizer_of_ones_own_steps(trainer, arguments, tiny_model):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.exit_heads.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    before = state(model)
    trainer(model, optimizers=(optimizer, schedule)).train()
    assert changed(before, state(model)) == {name for name in before if name.startswith("exit_heads.")}


def test_a_class_of_optimizer_is_used(trainer, arguments, tiny_model):
    def after(**fields):
        run = trainer(tiny_model(**NO_DROPOUT), arguments(max_grad_norm=0.0), **fields)
        run.train()
        return state(run.model)

    assert not same(after(), after(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-3})))


def test_a_collator_may_make_the_labels(trainer, tokenizer, rows):
    def collate(features):
        return {
            **tokenizer.pad(features, return_tensors="pt"),
            "labels": torch.tensor([len(f["input_ids"]) % 3 for f in features]),
        }

    data = rows(16, labels=None)
    run = trainer(train_dataset=data, eval_dataset=data, data_collator=collate)
    run.train()
    assert "eval_exit_1_accuracy" in run.evaluate()


@pytest.mark.parametrize("make", [lambda: BertForSequenceClassification(BertConfig(**SHAPE)), lambda: torch.nn.Linear(2, 2)])
def test_a_model_without_exits_is_refused_with_what_to_do(trainer, make):
    with pytest.raises(UsageError, match=r"has no exits; expected a model with exits.*from_pretrained"):
        trainer(make())


# --- training arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor"),
        ({"label_names": ["labels", "start"]}, "label_names"),
        ({"neftune_noise_alpha": 5, "objective": "two-stage"}, "neftune_noise_alpha"),
    ],
)
def test_what_cannot_work_is_refused_by_name(trainer, arguments, fields, name):
    with pytest.raises(TrainingError, match=name) as caught:
        trainer(args=arguments(**fields))
    assert caught.value.field == name


def test_liger_and_sharded_sequences_are_refused_by_name(trainer, arguments):
    args = arguments()
    args.use_liger_kernel = True  # at set-up it would ask for its package
    with pytest.raises(TrainingError, match="use_liger_kernel=True cannot be used here"):
        trainer(args=args)
    args = arguments()
    args.parallelism_config = type("ParallelismConfig", (), {"cp_size": 2, "sp_size": 1})()
    with pytest.raises(TrainingError, match=r"parallelism_config.cp_size=2 cannot be used here"):
        trainer(args=args)


def test_two_losses_at_once_are_refused(trainer, arguments):
    with pytest.raises(TrainingError, match=r"label_smoothing_factor=0.1 cannot be used here: compute_loss_func"):
        trainer(args=arguments(label_smoothing_factor=0.1), compute_loss_func=weighted)


@pytest.mark.parametrize("objective", ["weighted", "two-stage"])
def test_recomputing_activations_changes_nothing(trainer, arguments, tiny_model, objective):
    def after(**fields):
        run = trainer(tiny_model(**NO_DROPOUT), arguments(objective=objective, **fields))
        run.train()
        return state(run.model)

    assert same(after(), after(activation_checkpointing=True))


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself would be raised inside it
def test_a_compiled_step_learns_the_same(trainer, arguments, tiny_model):
    def after(**fields):
        run = trainer(tiny_model(**NO_DROPOUT), arguments(max_steps=2, optim="sgd", **fields))
        run.train()
        return state(run.exit_model)

    plain, compiled = after(), after(torch_compile=True, torch_compile_backend="eager")
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("fields", [{"bf16": True}, {"optim": "adafactor"}, {"train_sampling_strategy": "group_by_length"}])
def test_options_of_the_step_work(trainer, arguments, tiny_model, fields):
    run = trainer(tiny_model(), arguments(**fields))
    before = state(run.model)
    run.train()
    assert not same(before, state(run.model))
    assert all(torch.isfinite(value).all() for value in state(run.model).values())


def test_a_model_trained_in_mixed_precision_is_served_as_it_is_once_saved_and_loaded(
    trainer, arguments, tiny_model, rows, tmp_path
):
    run = trainer(tiny_model(), arguments(bf16=True))
    run.train()
    assert run.model.training
    assert "forward" in vars(run.model)  # that of Accelerate
    run.save_model(tmp_path)
    loaded = type(run.model).from_pretrained(tmp_path)
    traces = [ee.collect_trace(model, rows(16), labelled=False, progress=False) for model in (run.model, loaded)]
    assert torch.equal(traces[0].logits, traces[1].logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, and transformers takes fp16 on one only")
def test_half_precision_works_on_a_gpu(trainer, arguments, tiny_model):
    run = trainer(tiny_model(), arguments(fp16=True, use_cpu=False))
    before = state(run.model)
    run.train()
    assert not same(before, state(run.model))
    assert all(torch.isfinite(value).all() for value in state(run.model).values())


def test_a_model_split_over_devices_is_refused_by_name(trainer, arguments, monkeypatch):
    make = Trainer.create_accelerator_and_postprocess
    for name in ("fsdp", "deepspeed"):
        args = arguments()
        setattr(args, name, "zero.json")  # at set-up it would ask for its package
        with pytest.raises(TrainingError, match=f"{name} cannot be used here: it splits the model") as caught:
            trainer(args=args)
        assert caught.value.field == name

        def launched(self, name=name):
            make(self)
            setattr(self, f"is_{name}_enabled", True)

        with monkeypatch.context() as patch:  # as `accelerate launch` has it in its own configuration
            patch.setattr(Trainer, "create_accelerator_and_postprocess", launched)
            with pytest.raises(TrainingError, match=f"{name} cannot be used here"):
                trainer()


def test_models_saved_alone_load_and_cannot_be_resumed(trainer, arguments, tiny_model, tmp_path):
    def run(**fields):
        args = arguments(output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=3, **fields)
        return trainer(tiny_model(), args)

    first = run(save_only_model=True)
    first.train()
    folder = tmp_path / "run" / "checkpoint-3"
    assert not (folder / "optimizer.pt").exists()
    assert same(state(first.model), state(ee.EarlyExitBertForSequenceClassification.from_pretrained(folder)))
    with pytest.raises(EarlyExitError, match="holds no complete checkpoint"):
        run().train(resume_from_checkpoint=True)


def test_noise_in_the_embeddings_reaches_the_exits(trainer, arguments, tiny_model):
    def loss(**fields):
        return trainer(tiny_model(**NO_DROPOUT), arguments(max_steps=1, **fields)).train().training_loss

    assert loss() != loss(neftune_noise_alpha=50.0)
    assert loss() == loss()


EVALUATIONS = [
    {"eval_accumulation_steps": 1},
    {"eval_use_gather_object": True},
    {"bf16_full_eval": True},
    {"fp16_full_eval": True},
]


@pytest.mark.parametrize("fields", EVALUATIONS, ids=repr)
def test_options_of_evaluations_give_the_same_metrics(trainer, arguments, tiny_model, fields):
    def metrics(**more):
        run = trainer(tiny_model(), arguments(per_device_eval_batch_size=6, **more))
        return {name: value for name, value in run.evaluate().items() if "accuracy" in name}

    expected = metrics()
    assert metrics(**fields) == pytest.approx(expected, abs=0.11 if "full_eval" in str(fields) else 1e-12)
    assert len(expected) == 4


def test_evaluations_may_give_the_loss_alone(trainer, arguments):
    metrics = trainer(args=arguments(prediction_loss_only=True)).evaluate()
    assert "eval_loss" in metrics
    assert not any("exit" in name for name in metrics)


def test_batches_that_are_not_joined_give_the_same_metrics(trainer, arguments, tiny_model):
    shapes = []

    def compute_metrics(prediction):
        shapes.append([part.shape for part in prediction.predictions])
        return {"parts": len(prediction.predictions)}

    def metrics(**more):
        run = trainer(tiny_model(), arguments(per_device_eval_batch_size=8, **more), compute_metrics=compute_metrics)
        return run, run.evaluate()

    _, expected = metrics()
    run, parts = metrics(eval_do_concat_batches=False)
    assert shapes[1] == [(8, 3), (8, 3), (4, 3)]
    names = [name for name in expected if "exit" in name]
    assert len(names) == 4
    assert {name: parts[name] for name in names} == {name: expected[name] for name in names}
    predictions = run.predict(run.eval_dataset).predictions
    assert [part.shape for part in predictions] == [(8, 3), (8, 3), (4, 3)]


def test_metrics_may_have_inputs_and_losses(trainer, arguments):
    seen = {}

    def compute_metrics(prediction):
        seen.update(inputs=prediction.inputs, losses=prediction.losses, logits=prediction.predictions)
        return {}

    trainer(args=arguments(include_for_metrics=["inputs", "loss"]), compute_metrics=compute_metrics).evaluate()
    assert seen["inputs"].shape[0] == len(seen["losses"]) == len(seen["logits"]) == 20


def test_columns_that_the_model_does_not_read_change_nothing(trainer, arguments, tiny_model, rows):
    def after(data, **fields):
        run = trainer(tiny_model(**NO_DROPOUT), arguments(max_steps=2, **fields), train_dataset=data, eval_dataset=data)
        run.train()
        return state(run.model)

    data = rows(16, idx=list(range(16)))
    assert same(after(data), after(rows(16)))
    assert same(after(rows(16), remove_unused_columns=False), after(rows(16)))
    assert same(after(data, remove_unused_columns=False), after(rows(16)))  # as in the stock model
    segments = rows(16, token_type_ids=[[1] * len(ids) for ids in rows(16)["input_ids"][:]])
    assert not same(after(segments), after(rows(16)))  # what the model does read is kept


# --- labels -------------------------------------------------------------------------------------------------------------


def relabelled(rows, form, column="labels", **fields):
    data = rows(32)
    labels = [label % 2 for label in data["labels"][:]]
    return Dataset.from_dict({**data.remove_columns("labels").to_dict(), column: form(labels)}, **fields)


def trained(trainer, tiny_model, arguments, data, fields=TWO, **settings):
    run = trainer(tiny_model(**NO_DROPOUT, **fields), arguments(**settings), train_dataset=data, eval_dataset=data)
    run.train()
    return state(run.model), {name: value for name, value in run.evaluate().items() if "exit" in name or name == "eval_loss"}


FORMS = {
    "booleans": lambda labels: [bool(label) for label in labels],
    "int8": lambda labels: np.array(labels, dtype=np.int8),
    "a column": lambda labels: [[label] for label in labels],
    "names": lambda labels: ["pos" if label else "neg" for label in labels],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("column", ["labels", "label", "label_ids"])
def test_labels_of_every_form_teach_the_same(trainer, tiny_model, arguments, rows, form, column):
    weights, metrics = trained(trainer, tiny_model, arguments, relabelled(rows, list))
    others, other_metrics = trained(trainer, tiny_model, arguments, relabelled(rows, form, column))
    assert same(weights, others)
    assert metrics == other_metrics


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_streams_and_lists_are_read_alike(trainer, tiny_model, arguments, rows, form):
    weights, _ = trained(trainer, tiny_model, arguments, relabelled(rows, list), train_sampling_strategy="sequential")
    data = relabelled(rows, form)
    for given in (data.to_iterable_dataset(), list(data)):
        run = trainer(
            tiny_model(**NO_DROPOUT, **TWO),
            arguments(train_sampling_strategy="sequential"),
            train_dataset=given,
            eval_dataset=data,
        )
        run.train()
        assert same(weights, state(run.model))


@pytest.mark.parametrize("kind", ["torch", "numpy", None])
def test_formatted_data_sets_train_as_plain_ones(trainer, tiny_model, arguments, rows, kind):
    weights, metrics = trained(trainer, tiny_model, arguments, relabelled(rows, list))
    others, other_metrics = trained(trainer, tiny_model, arguments, relabelled(rows, list).with_format(kind))
    assert same(weights, others)
    assert metrics == other_metrics


def test_a_data_set_with_a_transform_trains(trainer, tiny_model, arguments, rows, tokenizer):
    texts = [" ".join(f"w{n}" for n in ids) for ids in rows(32)["input_ids"][:]]
    plain = Dataset.from_dict({"text": texts, "truth": [label % 2 for label in rows(32)["labels"][:]]})
    made = plain.with_transform(lambda batch: {**tokenizer(batch["text"]), "labels": batch["truth"]})
    run = trainer(tiny_model(**TWO), arguments(remove_unused_columns=False), train_dataset=made, eval_dataset=made)
    run.train()
    assert "eval_exit_1_accuracy" in run.evaluate()
    with pytest.raises(DataError, match="train_dataset has no column of labels among input_ids"):
        trainer(tiny_model(**TWO), train_dataset=plain.with_transform(lambda batch: tokenizer(batch["text"])))


def test_the_column_of_labels_may_have_any_name(trainer, tiny_model, arguments, rows):
    weights, metrics = trained(trainer, tiny_model, arguments, relabelled(rows, list))
    for form in FORMS.values():
        given = relabelled(rows, form, "target")
        others, other_metrics = trained(trainer, tiny_model, arguments, given, label_names=["target"])
        assert same(weights, others)
        assert metrics == other_metrics


def test_whole_numbers_of_many_labels_teach_what_floats_teach(trainer, tiny_model, arguments, rows):
    def after(kind):
        labels = [[kind(label % 2), kind(1), kind(label == 2)] for label in rows(32)["labels"][:]]
        return trained(trainer, tiny_model, arguments, rows(32, labels=labels), {"problem_type": MULTI})

    weights, metrics = after(float)
    for kind in (int, bool):
        others, other_metrics = after(kind)
        assert same(weights, others)
        assert metrics == other_metrics


def test_rows_of_floats_are_told_to_the_config(trainer, rows):
    data = rows(16, labels=[[1.0, 0.0, 1.0]] * 16)
    run = trainer(train_dataset=data, eval_dataset=data)
    assert run.model.config.problem_type == MULTI


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_texts_and_token_ids_of_many_lengths_are_refused_where_nothing_reads_them(trainer, which):
    texts = Dataset.from_dict({"text": ["w5", "w6"], "label": [0, 1]})
    with pytest.raises(DataError, match=f"{which} has text, label and no input_ids; let the tokenizer read it first"):
        trainer(**{which: texts})
    uneven = Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 5, 6, 7, 3]], "label": [0, 1]})
    even = Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 6, 3]], "label": [0, 1]})
    with pytest.raises(DataError, match=f"Rows of {which} have 3 to 5 token ids, and nothing pads them; pass processing_c"):
        trainer(**{"train_dataset": even, "eval_dataset": even, which: uneven}, processing_class=None)
    trainer(train_dataset=even, eval_dataset=even, processing_class=None).train()


def test_no_labels_are_refused_by_what_is_there(trainer, arguments, rows):
    for which in ("train_dataset", "eval_dataset"):
        with pytest.raises(
            DataError, match=f"{which} has no column of labels among input_ids, attention_mask; expected labels or"
        ):
            trainer(**{which: rows(8, labels=None)})
    with pytest.raises(DataError, match="eval_dataset has no column of labels"):
        trainer().evaluate(rows(8, labels=None))
    with pytest.raises(DataError, match="The batch has no labels among input_ids"):
        trainer(train_dataset=rows(8, labels=None).to_iterable_dataset()).train()


def test_two_columns_of_labels_must_agree(trainer, rows):
    labels = rows(8)["labels"][:]
    trainer(train_dataset=rows(8, label=labels))
    with pytest.raises(DataError, match="train_dataset has two columns of labels that differ, labels and label"):
        trainer(train_dataset=rows(8, label=[*labels[:-1], (labels[-1] + 1) % 3]))


def test_words_that_are_no_names_are_refused(trainer, rows, tiny_model):
    with pytest.raises(DataError, match=r"Row 0 of train_dataset has label 'good' \(column 'labels'\).*names neg, pos"):
        trainer(tiny_model(**TWO), train_dataset=rows(8, labels=["good"] * 8))
    stream = rows(8, labels=["good"] * 8).to_iterable_dataset()
    with pytest.raises(DataError, match="Row 0 of the batch has label 'good'"):
        trainer(tiny_model(**TWO), train_dataset=stream, eval_dataset=None).train()


@pytest.mark.parametrize("mark", [-1, -1.0, [-1]], ids=repr)
@pytest.mark.parametrize("as_list", [False, True])
def test_test_rows_without_true_labels_are_predicted(trainer, tiny_model, rows, mark, as_list):
    run = trainer(tiny_model())
    secret = rows(20, seed=1, labels=[mark] * 20)
    output = run.predict(list(secret) if as_list else secret)
    assert np.array_equal(output.predictions, run.predict(rows(20, seed=1)).predictions)
    assert output.label_ids is None
    assert not any("exit" in name for name in output.metrics)


def test_secret_labels_among_true_ones_are_refused(trainer, rows):
    with pytest.raises(DataError, match="Row 1 of test_dataset has label -1"):
        trainer().predict(rows(3, labels=[0, -1, 1]))


def test_named_test_rows_are_predicted_and_judged(trainer, tiny_model, rows):
    run = trainer(tiny_model(**TWO), train_dataset=None, eval_dataset=None)
    output = run.predict(relabelled(rows, FORMS["names"]))
    assert output.label_ids.tolist() == [label % 2 for label in rows(32)["labels"][:]]

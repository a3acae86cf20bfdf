"""What transformers' own tests of models assume, and what training must leave alone: over the whole table of families."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import IMAGE

from .tiny import IMAGES, PAD, TEXTS, VOCABULARY, batch_of, door, new_model, rows_of, stock_class, stock_of, tiny

every = pytest.mark.parametrize("name", FAMILIES)
text = pytest.mark.parametrize("name", TEXTS)
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "embd_pdrop",
              "attn_pdrop", "resid_pdrop", "classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout",
              "summary_first_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout", "hidden_dropout",
              "drop_path_rate")  # fmt: skip


def without_dropout(name):
    """A new model in training mode that drops nothing."""
    known = inspect.signature(door(name).config_class).parameters
    model = new_model(name, **{field: 0.0 for field in NO_DROPOUT if field in known})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model, batch):
    labels = torch.arange(len(next(iter(batch.values())))) % 3
    torch.manual_seed(0)
    model(**batch, labels=labels).loss.backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


@every
def test_a_tuple_is_returned_where_it_is_asked_for(name):
    model, batch = tiny(name), batch_of(name)
    labels = torch.arange(6) % 3
    with torch.inference_mode():
        whole, parts = model(**batch, labels=labels), model(**batch, labels=labels, return_dict=False)
        stock = stock_of(model, name)(**batch, labels=labels, return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[1], stock[1])
    assert [torch.equal(mine, theirs) for mine, theirs in zip(parts, whole.to_tuple(), strict=True)] == [True] * len(parts)


@every
def test_activations_computed_anew_give_the_same_gradients(name):
    model, batch = without_dropout(name), batch_of(name)
    again = copy.deepcopy(model)
    assert again.supports_gradient_checkpointing == stock_class(name).supports_gradient_checkpointing
    if not again.supports_gradient_checkpointing:  # ALBERT and MPNet, as the stock models
        with pytest.raises(ValueError, match="does not support"):
            again.activation_checkpointing_enable()
        return
    again.activation_checkpointing_enable()
    calls = []
    inner = next(part for part in again.family.layers_of(again.base_model)[0].modules() if not list(part.children()))
    inner.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    expected, found = gradients(model, batch), gradients(again, batch)
    assert len(calls) >= 2  # once more, on the way back
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


@text
def test_a_larger_vocabulary_changes_no_answer_and_is_kept(name, tmp_path):
    model, batch = new_model(name), batch_of(name)
    with torch.inference_mode():
        expected = model(**batch, early_exit=False).exit_logits
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    assert model.config.vocab_size == VOCABULARY + 5
    with torch.inference_mode():
        assert torch.equal(model(**batch, early_exit=False).exit_logits, expected)
    model.save_pretrained(tmp_path)
    read = copy.deepcopy(ee.from_pretrained(tmp_path).eval())  # a file's weights lie at odd addresses: one row rounds there
    new = {"input_ids": torch.tensor([[5, VOCABULARY + 4, 7]])}
    with torch.inference_mode():
        assert torch.equal(read(**batch, early_exit=False).exit_logits, expected)
        assert torch.equal(read(**new).logits, model(**new).logits)


@every
def test_exits_that_learn_in_a_second_stage_leave_the_answers_to_the_bit(name, arguments):
    model, batch = new_model(name), batch_of(name, rows=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(**batch).logits
    rows, collate = data_of(name)
    args = arguments(objective="two-stage", max_steps=2, per_device_train_batch_size=4, logging_strategy="no")
    ee.EarlyExitTrainer(model, args, train_dataset=rows, data_collator=collate).train()
    with torch.inference_mode():
        assert torch.equal(model.eval()(**batch).logits, expected)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith("exit_heads.")}


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [PAD] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor([row["labels"] for row in rows])}


@pytest.mark.parametrize("name", IMAGES)
def test_images_in_half_precision_are_read(name):
    model, batch = copy.deepcopy(tiny(name)).bfloat16(), batch_of(name)
    with torch.inference_mode():
        logits = model(**batch).logits
        served = ee.predict(model, [{"pixel_values": one} for one in batch["pixel_values"]]).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(served, logits.float())


def test_a_beit_that_has_answered_can_still_learn():
    model, batch = new_model("beit", image_size=48), batch_of("beit")
    with torch.inference_mode():
        model(**{**batch, "pixel_values": torch.randn(2, 3, 48, 48)})
    output = model.train()(pixel_values=torch.randn(2, 3, 48, 48), labels=torch.tensor([0, 1]))
    output.exit_logits.sum().backward()
    tables = [p.grad for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert tables
    assert all(bool((grad != 0).any()) for grad in tables)


def data_of(name, rows=8):
    """Rows to learn from, and what makes a batch of them."""
    batch, labels = batch_of(name, rows=rows), {"labels": [row % 3 for row in range(rows)]}
    if FAMILIES[name].task == IMAGE:
        return Dataset.from_dict({"pixel_values": batch["pixel_values"].numpy(), **labels}), None
    return Dataset.from_dict({"input_ids": [row["input_ids"] for row in rows_of(batch)], **labels}), padded


@every
def test_accumulated_gradients_are_those_of_one_batch(name, arguments):
    rows, collate = data_of(name)

    def weights(size, steps):
        model = without_dropout(name)
        sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        args = arguments(logging_strategy="no", **sgd, **sizes)
        ee.EarlyExitTrainer(model, args, train_dataset=rows, data_collator=collate).train()
        return model.state_dict()

    start, whole, parts = without_dropout(name).state_dict(), weights(8, 1), weights(2, 4)
    moved = max(float((whole[key] - start[key]).abs().max()) for key in start)
    assert moved > 1e-2
    assert all((whole[key] - parts[key]).abs().max() <= 1e-4 * moved for key in start)


@every
def test_a_resumed_run_ends_with_the_straight_ones_weights_to_the_bit(name, arguments, tmp_path):
    rows, collate = data_of(name)

    def run(folder, seed, resume=None):
        args = arguments(
            output_dir=str(tmp_path / folder), max_steps=4, save_strategy="steps", save_steps=2, logging_strategy="no",
            per_device_train_batch_size=4, save_only_model=False, lr_scheduler_type="linear",
        )  # fmt: skip
        model = new_model(name, seed=seed)
        ee.EarlyExitTrainer(model, args, train_dataset=rows, data_collator=collate).train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight = run("straight", 0)
    torch.manual_seed(99)
    resumed = run("resumed", 5, str(tmp_path / "straight" / "checkpoint-2"))
    halfway = ee.from_pretrained(tmp_path / "straight" / "checkpoint-2").state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    assert any(not torch.equal(value, halfway[key]) for key, value in straight.items())

"""Exits of a language model learn from text, above all from what the model itself writes."""

import pytest
import torch
from transformers import BertTokenizer

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, TrainingError
from tests.captions.toy import VOCABULARY
from tests.generation.conftest import LAYERS, PAD, WORDS, prompts

FAST = {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}


@pytest.fixture
def arguments(tmp_path):
    def make(**fields):
        quiet = {"output_dir": str(tmp_path), "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        return ee.EarlyExitTrainingArguments(**{**quiet, **FAST, **fields})

    return make


def samples(model, count=24, seed=2):
    torch.manual_seed(seed)
    ids = [row.tolist()[: 3 + place % 3] for place, row in enumerate(prompts(count, 5, seed=seed)[0])]
    return ee.generation.write_samples(model, ids, 8, max_new_tokens=14, do_sample=True, pad_token_id=PAD), ids


def test_samples_are_what_the_full_model_writes(writer):
    model = writer("llama", share=0.5)
    rows = ee.generation.write_samples(model, [[5, 9], [7, 8, 30, 12]], max_new_tokens=6, pad_token_id=PAD)
    for row, prompt in zip(rows, ([5, 9], [7, 8, 30, 12]), strict=True):
        full = model.generate(torch.tensor([prompt]), early_exit=False, max_new_tokens=6, pad_token_id=PAD)[0].tolist()
        assert row["input_ids"] == full
        assert row["labels"] == [-100] * len(prompt) + full[len(prompt) :]
    with pytest.raises(DataError, match="Prompt 0 is empty; expected at least one token in each"):
        ee.generation.write_samples(model, [[]])


@pytest.mark.parametrize(("name", "head"), [("llama", "tuned"), ("gpt2", "low-rank")])
def test_exits_learn_from_the_models_own_samples_and_nothing_else_moves(writer, arguments, name, head):
    torch.manual_seed(0)
    model = writer(name, exit_head=head, exit_rank=16)
    rows, held = samples(model)[0], samples(model, 12, seed=5)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"objective": "two-stage", "objective_options": {"direction": "last-to-exit"}, "max_steps": 120}
    trainer = ee.training.EarlyExitLanguageModelTrainer(model, arguments(**settings), train_dataset=rows, eval_dataset=held)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    for layer in range(1, LAYERS):
        assert last[f"eval_exit_{layer}_loss"] < first[f"eval_exit_{layer}_loss"]
    assert last[f"eval_exit_{LAYERS - 1}_agreement"] > first[f"eval_exit_{LAYERS - 1}_agreement"] + 0.1
    assert last[f"eval_exit_{LAYERS}_agreement"] == 1
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith("exit_heads.") for key in moved)


def test_the_log_counts_tokens_that_follow_labelled_ones(writer, arguments):
    model = writer("llama", exit_head="linear")
    rows = [{"input_ids": [5, 9, 7, 20]}, {"input_ids": [6, 8, 30], "labels": [-100, -100, 30]}]
    trainer = ee.training.EarlyExitLanguageModelTrainer(model, arguments(), eval_dataset=rows)
    seen = trainer.evaluate()
    with torch.no_grad():
        logits = [model(torch.tensor([row["input_ids"]]), early_exit=False).exit_logits[0] for row in rows]
    answers = torch.cat([logits[0][:3], logits[1][1:2]])
    truth = torch.tensor([9, 7, 20, 30])
    for exit_ in range(LAYERS):
        agrees = (answers[:, exit_].argmax(-1) == answers[:, -1].argmax(-1)).float().mean().item()
        loss = torch.nn.functional.cross_entropy(answers[:, exit_], truth).item()
        assert seen[f"eval_exit_{exit_ + 1}_agreement"] == pytest.approx(agrees)
        assert seen[f"eval_exit_{exit_ + 1}_loss"] == pytest.approx(loss, rel=1e-4)


def test_gates_learn_where_an_exit_agrees(writer, arguments):
    model = writer("qwen3", exit_gate="linear")
    rows = samples(model)[0]
    trainer = ee.training.EarlyExitLanguageModelTrainer(
        model, arguments(), learn_gates=True, train_dataset=rows, eval_dataset=rows
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    seen = trainer.evaluate()
    assert seen["eval_loss"] < first
    assert {"eval_gate_agreement", "eval_gate_layers", "eval_exit_1_share"} <= set(seen)


def test_packed_texts():
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)})
    tokenizer.eos_token = "[SEP]"
    rows = ee.training.pack_texts(["w5 w6 w7", "w8"], tokenizer, length=4)
    assert [row["input_ids"] for row in rows] == [[5, 6, 7, 2], [8, 2]]
    with pytest.raises(DataError, match="no text"):
        ee.training.pack_texts([], tokenizer)
    with pytest.raises(DataError, match="length"):
        ee.training.pack_texts(["w5"], tokenizer, length=1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([{"text": "a"}], "no input_ids in row 0"),
        ([{"input_ids": [4, WORDS]}], f"has {WORDS}"),
        ([{"input_ids": [4, 5], "labels": [4]}], "2 ids and 1 labels"),
        ([{"input_ids": [4, 5], "labels": [4, -100]}], "nothing to learn"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(writer, arguments, rows, words):
    with pytest.raises(DataError, match=words):
        ee.training.EarlyExitLanguageModelTrainer(writer("llama", exit_head="tuned"), arguments(), train_dataset=rows)


def test_what_cannot_train_is_refused(writer, arguments, tiny_model):
    model, rows = writer("llama"), [{"input_ids": [4, 5, 6]}]
    for taught, settings, options, words in (
        (model, {"objective": "two-stage"}, {}, "Nothing learns"),
        (model, {}, {"learn_gates": True}, "no gates"),
        (tiny_model(), {}, {}, "a trainer of its own"),
        (model, {}, {"compute_metrics": len}, "compute_metrics"),
    ):
        with pytest.raises(TrainingError, match=words):
            ee.training.EarlyExitLanguageModelTrainer(taught, arguments(**settings), train_dataset=rows, **options)

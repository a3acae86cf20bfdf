"""Every exit of a captioner learns every word and is reported; nothing else changes, faults have names."""

import json
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional
from transformers import TrainerCallback, ViTImageProcessorPil

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, TrainingError
from hf_earlyexit.training.token_metrics import row_sums
from hf_earlyexit.training.weights import load_weights
from tests.captions.conftest import END, LAYERS, PAD, START, WORDS
from tests.captions.toy import make_captioner

COUNT = 12


@pytest.fixture
def rows():
    """`rows(count=12, **columns)`: noise for images, captions of different lengths."""

    def make(count=COUNT, seed=0, **columns):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
        given = {
            "pixel_values": torch.randn(count, 3, 16, 16, generator=generator).numpy(),
            "labels": [[*torch.randint(3, 8, (n,), generator=generator).tolist(), END] for n in lengths],
            **columns,
        }
        return Dataset.from_dict({name: value for name, value in given.items() if value is not None})

    return make


@pytest.fixture
def arguments(arguments):
    return partial(arguments, per_device_train_batch_size=4, per_device_eval_batch_size=5, max_steps=2)


def trained(model, args, rows, **fields):
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=args, train_dataset=rows, **fields)
    trainer.train()
    return trainer


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("objective", ["weighted", "distillation"])
def test_joint_objectives_teach_every_weight_that_has_a_use(captioner, rows, arguments, objective):
    model = captioner(exit_head="linear", exit_gate="linear")
    before = weights(model)
    trainer = trained(model, arguments(objective=objective), rows())
    moved = changed(model, before)
    still = set(before) - moved
    assert all(name.startswith(("exit_gates.", "encoder.pooler.")) or name.endswith(".attn.bias") for name in still), still
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable <= moved, "a weight without a gradient would stop distributed training"
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_layers_of_the_decoder_are_dropped_and_exits_taught_in_turns(captioner, rows, arguments, kind):
    """The encoder runs whole; every weight learns, and evaluations tell of every exit."""
    model, seen = captioner(kind, exit_head="tied"), []
    for layer in model.backbone.layers(model.decoder):
        layer.register_forward_hook(lambda _, given, answer: seen.append(bool((answer == given[0]).all((1, 2)).any())))
    options = {"layer_dropout": 1.0, "curriculum": "rotational"}
    before = weights(model)
    trainer = trained(model, arguments(objective="layerskip", objective_options=options, max_steps=4), rows())
    passed = np.array(seen).reshape(4, LAYERS)
    assert passed[:, -1].all()
    assert not passed[:, 0].any()
    assert passed[:, 1:3].any()
    still = set(before) - changed(model, before)
    last = next(name for name, part in model.named_modules() if part is model.backbone.layers(model.decoder)[-1])
    assert all(name.startswith(("encoder.pooler.", last)) or name.endswith(".attn.bias") for name in still), still
    seen.clear()
    metrics = trainer.evaluate(rows(5, seed=1))
    assert not any(seen)
    assert {f"eval_exit_{layer}_agreement" for layer in model.exit_layers} <= set(metrics)


@pytest.mark.parametrize("head", ["tuned", "linear", "low-rank"])
def test_two_stage_leaves_the_full_model_alone_to_the_bit(captioner, rows, arguments, images, head):
    model = captioner(exit_head=head)
    before, said = weights(model), model.generate(images(3), early_exit=False, max_new_tokens=8)
    trained(model, arguments(objective="two-stage", objective_options={"strength": 1.0}), rows())
    assert changed(model, before) == {name for name in before if name.startswith("exit_heads.")}
    assert torch.equal(model.eval().generate(images(3), early_exit=False, max_new_tokens=8), said)


def test_two_stage_is_the_authors_loss_but_for_a_factor(captioner, rows, arguments):
    """Half cross entropy, half KL(last || exit), a mean over early exits; every token counts the same."""
    model = captioner(exit_head="linear").eval()
    options = {"strength": 1.0, "direction": "last-to-exit"}
    trainer = ee.captions.EarlyExitCaptioningTrainer(
        model=model, args=arguments(objective="two-stage", objective_options=options), train_dataset=rows()
    )
    batch = ee.captions.CaptionCollator()([rows()[row] for row in range(5)])
    loss = trainer.compute_loss(model, dict(batch))
    with torch.no_grad():
        said = model(**batch, early_exit=False).exit_logits
    learned = batch["labels"] != -100
    last, parts = said[learned][:, -1].log_softmax(-1), []
    for exit_ in range(LAYERS - 1):
        own = said[learned][:, exit_].log_softmax(-1)
        parts.append(0.5 * functional.nll_loss(own, batch["labels"][learned]))
        parts.append(0.5 * functional.kl_div(own, last, log_target=True, reduction="batchmean"))
    torch.testing.assert_close(loss.detach(), 2 * sum(parts) / (LAYERS - 1))


def test_what_does_not_learn_has_no_dropout_and_no_graph(captioner, rows, arguments):
    model = captioner(exit_head="linear")
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen["modes"] = {name: part.training for name, part in model.named_children()}

    model.encoder.register_forward_hook(lambda _, __, output: seen.update(graph=output.last_hidden_state.requires_grad))
    trained(model, arguments(objective="two-stage"), rows(), callbacks=[Look()])
    assert seen["modes"]["exit_heads"]
    assert not seen["modes"]["encoder"]
    assert not seen["modes"]["decoder"]
    assert seen["graph"] is False


def test_gates_learn_alone_and_learn_what_is_asked(captioner, rows, arguments):
    model = captioner(exit_gate="linear", exit_head="linear")
    before = weights(model)
    data = rows(24)
    args = arguments(max_steps=30, learning_rate=6e-2, logging_steps=60, per_device_train_batch_size=24)
    first = ee.captions.EarlyExitCaptioningTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, learn_gates=True
    )
    start = first.evaluate()
    first.train()
    end = first.evaluate()
    assert changed(model, before) == {name for name in before if name.startswith("exit_gates.")}
    assert end["eval_loss"] < 0.7 * start["eval_loss"]
    assert end["eval_gate_agreement"] > start["eval_gate_agreement"]
    assert sum(end[f"eval_exit_{layer}_share"] for layer in range(1, LAYERS + 1)) == pytest.approx(1)
    shares = [end[f"eval_exit_{layer}_share"] * layer for layer in range(1, LAYERS + 1)]
    assert end["eval_gate_layers"] == pytest.approx(sum(shares))


def test_gate_loss_asks_for_the_full_models_word(captioner, rows, arguments):
    model = captioner(exit_gate="linear", exit_head="linear").eval()
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), train_dataset=rows(), learn_gates=True)
    batch = ee.captions.CaptionCollator()([rows()[row] for row in range(4)])
    with torch.no_grad():
        output = model(**batch, early_exit=False)
    learned = batch["labels"] != -100
    words, gates = output.exit_logits[learned].argmax(-1), output.exit_scalars["gate"][learned]
    right = (words[:, :-1] == words[:, -1:]).float()
    assert 0 < right.mean() < 1
    expected = functional.binary_cross_entropy_with_logits(gates, right)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)).detach(), expected)


@pytest.mark.parametrize("gate", [None, "linear"])
def test_evaluation_reports_every_exit_token_by_token(captioner, rows, arguments, gate):
    """The batches are of 5, 5 and 2 captions of different lengths; tokens count, not batches."""
    model = captioner(exit_head="linear", exit_gate=gate)
    data = rows()
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), eval_dataset=data)
    metrics = trainer.evaluate()
    batch = ee.captions.CaptionCollator()([data[row] for row in range(COUNT)])
    with torch.no_grad():
        output = model(**batch, early_exit=False)
    learned = batch["labels"] != -100
    said, truth = output.exit_logits[learned], batch["labels"][learned]
    for exit_ in range(LAYERS):
        accuracy = (said[:, exit_].argmax(-1) == truth).float().mean()
        assert metrics[f"eval_exit_{exit_ + 1}_token_accuracy"] == pytest.approx(float(accuracy))
        loss = functional.cross_entropy(said[:, exit_], truth)
        assert metrics[f"eval_exit_{exit_ + 1}_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert ("eval_gate_agreement" in metrics) == (gate is not None)


def test_gate_figures_are_those_of_leaving_at_one_half(captioner, rows):
    model = captioner(exit_head="linear", exit_gate="linear")
    batch = ee.captions.CaptionCollator()([rows()[row] for row in range(COUNT)])
    learned = batch["labels"] != -100
    with torch.no_grad():
        output = model(**batch, early_exit=False, exit_tokens=learned)
    gates = output.exit_scalars["gate"].tolist()
    taken = [next((e for e, gate in enumerate(row) if gate >= 0), LAYERS - 1) for row in gates]
    words = output.exit_logits.argmax(-1)
    sums = row_sums(output, batch["labels"]).sum(0)
    assert len(set(taken)) > 2
    assert sums[1 + 3 * LAYERS : -1].tolist() == [taken.count(exit_) for exit_ in range(LAYERS)]
    assert sums[-1] == sum(bool(words[n, e] == words[n, -1]) for n, e in enumerate(taken))


def test_chosen_tokens_get_what_all_tokens_get(captioner, rows):
    model = captioner(exit_head="low-rank", exit_gate="mlp")
    batch = ee.captions.CaptionCollator()([rows()[row] for row in range(4)])
    learned = batch["labels"] != -100
    with torch.no_grad():
        whole, part = (model(**batch, early_exit=False, exit_tokens=tokens) for tokens in (None, learned))
    assert part.exit_logits.shape == (int(learned.sum()), LAYERS, WORDS)
    torch.testing.assert_close(part.exit_logits, whole.exit_logits[learned])
    torch.testing.assert_close(part.exit_scalars["gate"], whole.exit_scalars["gate"][learned])


def test_no_exit_logits_of_padding_are_made(captioner, rows, arguments):
    model = captioner(exit_head="linear")
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), train_dataset=rows())
    asked = []
    model.exit_heads["1"].register_forward_hook(lambda _, inputs, __: asked.append(inputs[0].shape[0]))
    batch = ee.captions.CaptionCollator()([{**rows()[0], "labels": [5] * 9}, {**rows()[1], "labels": [END]}])
    trainer.compute_loss(model, batch)
    assert asked == [10]


def test_cached_features_train_as_their_images_do(captioner, rows, arguments):
    data = rows()
    losses = []
    for cached in (False, True):
        model = captioner(exit_head="linear")
        model.encoder.requires_grad_(False)
        part = data
        if cached:
            with torch.no_grad():
                states = model.encoder(torch.tensor(data["pixel_values"])).last_hidden_state
            part = data.remove_columns("pixel_values").add_column("encoder_hidden_states", states.tolist())
        trainer = trained(model, arguments(seed=1), part)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert not any(weight.requires_grad for weight in model.encoder.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_features_alone_freeze_the_encoder(captioner, rows, arguments):
    data = rows(pixel_values=None, encoder_hidden_states=np.zeros((COUNT, 5, 24)).tolist())
    model = captioner()
    ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), train_dataset=data)
    assert not any(weight.requires_grad for weight in model.encoder.parameters())


def test_packed_captions_are_passed_on(captioner, rows, arguments):
    """Several captions in one row, by ids and positions of the user's own, are what they are one by one."""
    model = captioner(exit_head="linear")
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), train_dataset=rows())
    batch = ee.captions.CaptionCollator()([rows()[0], rows()[1]])
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    plain = trainer.compute_loss(model, dict(batch))
    packed = trainer.compute_loss(model, {**batch, "decoder_input_ids": ids, "decoder_position_ids": None})
    assert torch.equal(plain, packed)
    moved = torch.arange(ids.shape[1]).expand_as(ids) + 3
    assert not torch.equal(trainer.compute_loss(model, {**batch, "decoder_position_ids": moved}), plain)


def test_a_stopped_run_goes_on_to_the_same_weights(captioner, rows, arguments, tmp_path):
    args = {"objective": "two-stage", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    whole, again = captioner(exit_head="tuned"), captioner(exit_head="tuned")
    trained(whole, arguments(**args), rows())
    (tmp_path / "checkpoint-4").rename(tmp_path / "later")
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=again, args=arguments(**args), train_dataset=rows())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


def test_bfloat16_autocast_keeps_the_loss_in_float32(captioner, rows, arguments):
    model = captioner(exit_head="linear", exit_gate="linear")
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(bf16=True), train_dataset=rows())
    batch = ee.captions.CaptionCollator()([rows()[row] for row in range(4)])
    with torch.autocast("cpu", torch.bfloat16):
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.exit_logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    trainer.train()
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"labels": None}, "expected labels among them"),
        ({"labels": [[5], [6, 50]]}, "Row 1 of train_dataset has label 50; expected 0 to 49"),
        ({"labels": [[-1], [6]]}, "Row 0 of train_dataset has label -1"),
        ({"labels": [[5], [-100, -100]]}, "Row 1 of train_dataset has no label to learn"),
        ({"labels": [[5], []]}, "Row 1 of train_dataset has no label to learn"),
    ],
)
def test_captions_that_cannot_be_learned(captioner, rows, arguments, columns, words):
    with pytest.raises(DataError, match=words):
        ee.captions.EarlyExitCaptioningTrainer(model=captioner(), args=arguments(), train_dataset=rows(2, **columns))


def test_batches_that_cannot_be_learned(captioner, rows, arguments):
    model = captioner()
    trainer = ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), train_dataset=rows())
    with pytest.raises(DataError, match="no labels"):
        trainer.compute_loss(model, {"pixel_values": torch.zeros(1, 3, 16, 16)})
    with pytest.raises(DataError, match="Every label of a batch is -100"):
        trainer.compute_loss(model, {"pixel_values": torch.zeros(1, 3, 16, 16), "labels": torch.tensor([[-100]])})
    with pytest.raises(DataError, match="expected labels"):
        ee.captions.CaptionCollator()([{"pixel_values": np.zeros((3, 16, 16))}])
    with pytest.raises(DataError, match="expected pixel_values"):
        ee.captions.CaptionCollator()([{"labels": [3], "photo": 1}])
    with pytest.raises(DataError, match="expected the same"):
        ee.captions.CaptionCollator()([{"labels": [3], "pixel_values": np.zeros((3, n, n))} for n in (8, 16)])
    with pytest.raises(DataError, match="has no rows"):
        ee.captions.EarlyExitCaptioningTrainer(model=model, args=arguments(), train_dataset=rows(2).select([]))


def test_training_that_cannot_work(captioner, rows, arguments):
    make = ee.captions.EarlyExitCaptioningTrainer
    with pytest.raises(TrainingError, match="no gates to teach"):
        make(model=captioner(), args=arguments(), train_dataset=rows(), learn_gates=True)
    with pytest.raises(TrainingError, match="'tied' heads have no weights"):
        make(model=captioner(), args=arguments(objective="two-stage"), train_dataset=rows())
    with pytest.raises(TrainingError, match="write captions with `generate`"):
        make(model=captioner(), args=arguments(), train_dataset=rows(), compute_metrics=lambda _: {})


TOKENS = ("decoder_start_token_id", "pad_token_id")


def without(model, name, *places):
    """The captioner without that token; where the config cannot lose it by deletion, it holds None."""
    for settings in places:
        part = getattr(model, settings)
        setattr(part, name, None)
        if settings == "config":
            delattr(part, name)  # as a config.json that never had it
    return model


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_that_only_generation_knows_shifts_the_captions(captioner, images, name):
    labels = torch.tensor([[5, -100, 6, END], [7, END, -100, -100]])
    model = captioner()
    expected = model(images(2), labels=labels, early_exit=False)
    bare = without(captioner(), name, "config")
    answer = bare(images(2), labels=labels, early_exit=False)
    assert torch.equal(answer.exit_logits, expected.exit_logits)
    assert torch.equal(answer.loss, expected.loss)
    shifted = bare.prepare_decoder_input_ids_from_labels(labels.tolist())
    assert shifted.tolist() == [[START, 5, PAD, 6], [START, 7, END, PAD]]


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_that_nobody_set_is_asked_for(captioner, images, rows, arguments, name):
    labels = torch.tensor([[5, 6, END]])
    model = without(captioner(), name, "config", "generation_config")
    for call in (
        lambda: model.train()(images(1), labels=labels),
        lambda: model.eval()(images(1), labels=labels, early_exit=False),
        lambda: model.prepare_decoder_input_ids_from_labels(labels),
        lambda: trained(model, arguments(), rows()),
    ):
        with pytest.raises(TrainingError, match=f"model.config.{name} is not set") as caught:
            call()
        assert caught.value.field == name
    given = torch.tensor([[START, 5, 6]])  # nothing is shifted where the decoder's inputs are given
    assert model.eval()(images(1), labels=labels, decoder_input_ids=given, early_exit=False).loss.isfinite()


@pytest.mark.parametrize("value", [-1, WORDS, 1.5, True, "x", [1]])
@pytest.mark.parametrize("name", TOKENS)
def test_a_token_that_is_none_is_refused(captioner, images, name, value):
    model = captioner()
    setattr(model.config, name, value)
    with pytest.raises(TrainingError, match=rf"config.{name} is .*; expected the number of a token, 0 to {WORDS - 1}"):
        model(images(1), labels=torch.tensor([[5, -100, 6]]), early_exit=False)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([[5.0, 6.0]]), "are of type float32; expected token ids"),
        (torch.tensor([[True, False]]), "are of type bool"),
        (torch.tensor([5, 6]), r"have the shape \[2\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"have the shape \[1, 0\]"),
        (torch.tensor([[5, 6], [7, 8]]), r"have the shape \[2, 2\], pixel_values \[1, 3, 16, 16\]"),
        (torch.full((1, 41), 5), "have 41 tokens a row; expected at most 40"),
        ([[5, WORDS, 6]], f"have {WORDS} in row 0 at token 1; expected 0 to {WORDS - 1}, or -100"),
        ([[-5, 6]], "have -5 in row 0 at token 0"),
        ([[5, 6], [7]], "are list; expected token ids"),
        ("a dog", "are str; expected token ids"),
    ],
)
def test_labels_that_are_no_captions(captioner, images, labels, words):
    with pytest.raises(DataError, match=words):
        captioner()(images(1), labels=labels, early_exit=False)


def test_labels_of_other_tokens_than_the_decoder_reads(captioner, images):
    with pytest.raises(DataError, match=r"shape \[1, 3\], decoder_input_ids \[1, 2\]"):
        captioner()(images(1), labels=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[1, 5]]), early_exit=False)


@pytest.mark.parametrize("form", [torch.int32, torch.uint8, "array", "lists"])
def test_labels_are_captions_in_any_form(captioner, images, form):
    labels, model = torch.tensor([[5, 6, END]]), captioner()
    other = labels.numpy() if form == "array" else labels.tolist() if form == "lists" else labels.to(form)
    answers = [model(images(1), labels=part, early_exit=False) for part in (labels, other)]
    assert torch.equal(answers[0].exit_logits, answers[1].exit_logits)
    assert torch.equal(answers[0].loss, answers[1].loss)


# --- rows of images and captions --------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose words are numbers."""

    eos_token_id = END

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


@pytest.fixture
def photos():
    """Two photos with two captions and one."""
    colours = [Image.new("L", (30, 20), 200), Image.new("RGB", (16, 16), (255, 0, 0))]
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    return Dataset.from_dict({"image": colours, "captions": [["5 6", "7"], ["8 9 10"]]}, features=features)


@pytest.mark.parametrize("decoded", [True, False])
def test_images_and_captions_become_rows(photos, decoded):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    photos = photos.cast_column("image", datasets.Image(decode=decoded))
    rows = ee.captions.CaptionRows(photos, processor, Words(), max_length=3)
    assert [row["labels"] for row in rows] == [[5, 6, END], [7, END], [8, 9, 10]]
    assert torch.equal(rows[0]["pixel_values"], rows[1]["pixel_values"])
    assert rows[2]["pixel_values"].shape == (3, 16, 16)
    assert rows[2]["pixel_values"].mean((1, 2)).tolist() == [1.0, -1.0, -1.0]
    assert ee.captions.CaptionCollator()([rows[0], rows[1]])["labels"].tolist() == [[5, 6, END], [7, END, -100]]


def test_captions_with_features_train(photos, captioner, arguments):
    rows = ee.captions.CaptionRows(photos, tokenizer=Words(), features=np.random.default_rng(0).normal(size=(2, 5, 24)))
    model = captioner(exit_head="tuned")
    trained(model, arguments(), rows, eval_dataset=rows)
    assert not any(weight.requires_grad for weight in model.encoder.parameters())


def test_rows_that_cannot_be_made(photos):
    class NoEnd:
        pass

    with pytest.raises(DataError, match="neither an eos nor a sep token"):
        ee.captions.CaptionRows(photos, object(), NoEnd())
    with pytest.raises(DataError, match="Pass an image_processor"):
        ee.captions.CaptionRows(photos, tokenizer=Words())
    with pytest.raises(DataError, match="3 features for 2 images"):
        ee.captions.CaptionRows(photos, tokenizer=Words(), features=np.zeros((3, 5, 24)))
    with pytest.raises(DataError, match="expected 'text' among them"):
        ee.captions.CaptionRows(photos, object(), Words(), captions_column="text")
    with pytest.raises(DataError, match="hold no captions"):
        ee.captions.CaptionRows([{"image": 1, "captions": []}], object(), Words())
    with pytest.raises(DataError, match=r"There is no picture nowhere\.jpg"):
        ee.captions.CaptionRows([{"image": "nowhere.jpg", "captions": "5"}], object(), Words())[0]


def test_the_log_is_json(captioner, rows, arguments):
    trainer = trained(
        captioner(exit_gate="linear"), arguments(eval_strategy="steps", eval_steps=1), rows(), eval_dataset=rows()
    )
    assert "eval_exit_4_token_accuracy" in json.dumps(trainer.state.log_history)


# --- arguments of the Trainer ---------------------------------------------------------------------------------------------


def heavy(outputs, labels, num_items_in_batch=None):
    """A loss in which the end of a caption counts ten times, scaled as the documentation asks for."""
    weight = torch.ones(WORDS)
    weight[END] = 10.0
    losses = functional.cross_entropy(outputs.logits, labels, weight, reduction="none")
    return losses.sum() / num_items_in_batch if num_items_in_batch is not None else losses.mean()


def evaluated(model, args, data, **fields):
    return ee.captions.EarlyExitCaptioningTrainer(model=model, args=args, eval_dataset=data, **fields).evaluate()[
        "eval_loss"
    ]


@pytest.mark.parametrize("exit_", range(LAYERS))
def test_a_loss_of_ones_own_is_asked_at_every_exit_for_labelled_tokens(captioner, rows, arguments, exit_):
    model, data = captioner(exit_head="linear").eval(), rows(5)
    batch = ee.captions.CaptionCollator()([data[row] for row in range(5)])
    with torch.no_grad():
        logits = model(**batch, early_exit=False).exit_logits[..., exit_, :]
    learned = batch["labels"] != -100
    expected = functional.cross_entropy(
        logits[learned], batch["labels"][learned], torch.where(torch.arange(WORDS) == END, 10.0, 1.0), reduction="none"
    ).mean()
    weights = [float(index == exit_) for index in range(LAYERS)]
    args = arguments(objective_options={"weights": weights})
    assert evaluated(model, args, data, compute_loss_func=heavy) == pytest.approx(float(expected), rel=1e-5)
    assert evaluated(model, args, data) != pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize("compute", [None, heavy])
def test_captions_accumulate_as_one_batch(captioner, rows, arguments, compute):
    data = rows(8, labels=[[3 + row % 5, 4, END] for row in range(8)])  # of one length: means of means are means

    def step(batch, accumulate):
        model = captioner(exit_head="linear")
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        args = arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1, optim="sgd",
                         learning_rate=0.1, max_grad_norm=0.0)  # fmt: skip
        before = weights(model)
        trained(model, args, data, compute_loss_func=compute)
        return {name: value - before[name] for name, value in weights(model).items()}

    whole, parts = step(8, 1), step(2, 4)
    largest = max(value.abs().max().item() for value in whole.values())
    assert largest > 1e-3
    assert all((whole[name] - parts[name]).abs().max() <= 1e-4 * largest for name in whole)


@pytest.mark.parametrize("exit_", [0, LAYERS - 1])
def test_label_smoothing_is_torchs_at_every_exit(captioner, rows, arguments, exit_):
    model, data = captioner(exit_head="linear").eval(), rows(5)
    batch = ee.captions.CaptionCollator()([data[row] for row in range(5)])
    with torch.no_grad():
        logits = model(**batch, early_exit=False).exit_logits[..., exit_, :]
    learned = batch["labels"] != -100
    expected = functional.cross_entropy(logits[learned], batch["labels"][learned], label_smoothing=0.3)
    options = {"weights": [float(index == exit_) for index in range(LAYERS)]}
    args = arguments(objective_options=options, label_smoothing_factor=0.3)
    assert evaluated(model, args, data) == pytest.approx(float(expected), rel=1e-5)
    assert evaluated(model, arguments(objective_options=options), data) != pytest.approx(float(expected), rel=1e-3)


def test_what_captions_cannot_use_is_refused_by_name(captioner, rows, arguments):
    def make(args=None, **fields):
        model = captioner(exit_head="linear", exit_gate="linear")
        return ee.captions.EarlyExitCaptioningTrainer(model=model, args=args or arguments(), train_dataset=rows(), **fields)

    make(arguments(label_names=["labels"]))
    for args, fields, name in (
        (arguments(label_names=["words"]), {}, "label_names"),
        (arguments(label_smoothing_factor=0.1), {"learn_gates": True}, "label_smoothing_factor"),
        (arguments(label_smoothing_factor=0.1), {"compute_loss_func": heavy}, "label_smoothing_factor"),
        (arguments(), {"learn_gates": True, "compute_loss_func": heavy}, "compute_loss_func"),
    ):
        with pytest.raises(TrainingError, match=f"{name}.* cannot be used here") as caught:
            make(args, **fields)
        assert caught.value.field == name


def test_weights_of_a_checkpoint_are_taken_up_whole(tmp_path):
    model, other = make_captioner(), make_captioner(seed=1)  # the encoder's tensors have other names in the file
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())

"""LayerSkip's recipe: layers are dropped row by row, exits taught in turns, and what comes out is a plain model."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import TrainingError, UsageError
from hf_earlyexit.losses import LayerSkipObjective, Progress
from hf_earlyexit.training.layer_dropout import dropped_layers, dropping
from tests.generation.conftest import LAYERS, PAD, WRITERS, prompts, stock_class
from tests.generation.test_training import arguments, samples  # noqa: F401

EXITS = [1, 2, 3, LAYERS]


def trainer_of(model, args, rows, held=None):
    return ee.training.EarlyExitLanguageModelTrainer(model, args, train_dataset=rows, eval_dataset=held)


def batch_of(rows):
    return ee.training.TokenCollator()(rows)


def test_layers_are_dropped_as_often_as_the_formula_says():
    """Over 4,000 rows: p (exp(l ln 2 / (L - 1)) - 1), each layer and row for itself."""
    labels = torch.randint(0, 90, (4000, 5), generator=torch.Generator().manual_seed(0))
    chances = LayerSkipObjective(layer_dropout=0.4).drop_chances(6)
    dropped = dropped_layers(chances, labels, seed=3, step=7).double()
    assert dropped.shape == (6, 4000)
    apart = (dropped.mean(1) - chances).abs()
    assert (apart <= 4 * (chances * (1 - chances) / 4000).sqrt()).all()
    assert not dropped[0].any()
    together = (dropped[4] * dropped[5]).mean()
    assert abs(together - chances[4] * chances[5]) < 4 * (chances[4] * chances[5] / 4000).sqrt()


def test_a_row_draws_by_its_labels_the_seed_and_the_step():
    """In any order and company, padded to any width: that is what makes runs resumable and independent of processes."""
    labels = torch.randint(0, 90, (50, 5), generator=torch.Generator().manual_seed(0))
    chances = torch.full((LAYERS,), 0.5)
    dropped = dropped_layers(chances, labels, 0, 0)
    padded = torch.nn.functional.pad(labels, (0, 3), value=-100)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dropped_layers(chances, padded[order][:20], 0, 0), dropped[:, order[:20]])
    for seed, step in ((1, 0), (0, 1)):
        assert not torch.equal(dropped_layers(chances, labels, seed, step), dropped)


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_that_passes_over_a_layer_keeps_its_state(writer, name):
    """Every family: states behind a dropped layer are those before it, and what comes after goes on from them."""
    model = writer(name, exit_head="tied")
    ids = prompts(3, 6)[0]
    dropped = torch.zeros(LAYERS, 3, dtype=torch.bool)
    dropped[1, 0] = dropped[3, 0] = dropped[2, 1] = True
    layers = model.backbone.layers(model)
    with torch.no_grad():
        plain = model(ids, early_exit=False, output_hidden_states=True)
        with dropping(layers, dropped):
            output = model(ids, early_exit=False, output_hidden_states=True)
        again = model(ids, early_exit=False)
    states = output.hidden_states
    for layer in range(1, LAYERS):  # the last state is behind the norm
        same = [torch.equal(states[layer][row], states[layer - 1][row]) for row in range(3)]
        assert same == dropped[layer - 1].tolist()
    for row, first in ((0, 1), (1, 2), (2, LAYERS)):
        assert all(torch.equal(states[at][row], plain.hidden_states[at][row]) for at in range(first + 1))
    assert torch.equal(states[-1][2], plain.hidden_states[-1][2]), "a row that drops nothing is not touched by the others"
    assert torch.equal(output.exit_logits[0, :, 0], output.exit_logits[0, :, 1]), "exits read what passed over the layer"
    assert torch.equal(again.exit_logits, plain.exit_logits), "afterwards all layers run"
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_batch_that_is_cut_is_refused(writer):
    model = writer("llama")
    layers = model.backbone.layers(model)
    with (
        pytest.raises(TrainingError, match="a batch of 3"),
        dropping(layers, torch.zeros(LAYERS, 3, dtype=torch.bool)),
    ):
        model(prompts(2, 4)[0], early_exit=False)
    assert not any("forward" in vars(layer) for layer in layers)


def test_the_last_of_several_wrappers_is_taken_off_alone(writer):
    model = writer("llama")
    layers = model.backbone.layers(model)
    layers[0].forward = of_others = layers[0].forward
    with dropping(layers, torch.zeros(LAYERS, 2, dtype=torch.bool)):
        model(prompts(2, 4)[0], early_exit=False)
    assert layers[0].forward is of_others
    del layers[0].forward


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_network_without_what_was_dropped(writer, arguments, checkpointing):  # noqa: F811
    """By a training step of the Trainer against layers that are left out by hand, row by row; the trunk learns from all."""
    model = writer("llama", exit_head="tied")
    settings = {"objective": "layerskip", "objective_options": {"layer_dropout": 1.0, "curriculum": "none"}}
    trainer = trainer_of(model, arguments(**settings), samples(model, 6)[0])
    if checkpointing:  # by the name that a release of transformers has for it
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_of([trainer.train_dataset[row] for row in range(6)])
    loss = trainer.training_step(model, dict(batch))
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    if checkpointing:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    dropped = dropped_layers(LayerSkipObjective(layer_dropout=1.0).drop_chances(LAYERS), batch["labels"], 42, 0)
    assert dropped[1:3].any()
    assert not dropped[1:3].all()
    assert dropped[3].all()
    assert not dropped[0].any()
    words, logits = [], []
    for row in range(6):
        ids, labels = batch["input_ids"][row : row + 1], batch["labels"][row]
        learned = torch.nn.functional.pad(labels, (0, 1), value=-100)[1:]
        hidden, states = model.model.embed_tokens(ids), []
        places = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, position_ids=places)
        for layer, gone in zip(model.model.layers, dropped[:, row].tolist(), strict=True):
            if not gone:
                hidden = layer(hidden, attention_mask=None, position_ids=places, position_embeddings=rotary)
            states.append(model.lm_head(model.model.norm(hidden))[0])
        logits.append(torch.stack(states, 1)[learned != -100])
        words.append(learned[learned != -100])
    expected = trainer.objective(torch.cat(logits), torch.cat(words), "single_label_classification", EXITS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, weight in model.named_parameters():
        if weight.grad is None:
            assert name.startswith("model.layers.3."), name  # everybody passed over the last layer
            assert not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-6, msg=name)
            assert weight.grad.any(), name


def test_exits_that_are_not_taught_are_not_asked(writer, arguments, monkeypatch):  # noqa: F811
    """Step for step the exits of the curriculum, and in evaluations all of them."""
    model, asked = writer("gpt2", exit_head="tied"), []
    rows = samples(model)[0]
    settings = {"objective": "layerskip", "objective_options": {"rotation": 2}, "max_steps": 4}
    trainer = trainer_of(model, arguments(**settings), rows, rows[:8])
    logits = type(model).exit_logits
    monkeypatch.setattr(
        type(model), "exit_logits", lambda self, index, hidden: asked.append(index) or logits(self, index, hidden)
    )
    trainer.train()
    assert asked == [0, 2, 1, 0, 2, 1]
    asked.clear()
    trainer.evaluate()
    assert asked == [0, 1, 2]
    trainer.objective = LayerSkipObjective(curriculum="gradual")
    trainer.state.max_steps = 80
    for step, expected in ((0, []), (20, [1, 2]), (70, [0, 1, 2])):
        asked.clear()
        trainer.state.global_step = step
        trainer.compute_loss(model.train(), batch_of(rows[:4]))
        assert asked == expected
        assert trainer.objective.taught(EXITS, Progress(step, 80)) == [*expected, 3]


def test_asked_exits_answer_as_they_do_among_all(writer):
    model = writer("qwen2", exit_gate="linear")
    ids = prompts(3, 5)[0]
    chosen = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    every = model(ids, early_exit=False)
    some = model(ids, early_exit=False, exit_tokens=chosen, asked_exits=[0, 2, 3])
    assert torch.equal(some.exit_logits, every.exit_logits[chosen][:, [0, 2, 3]])
    assert torch.equal(some.exit_scalars["gate"], every.exit_scalars["gate"][chosen][:, [0, 2]])
    last = model(ids, early_exit=False, asked_exits=[3])
    assert torch.equal(last.exit_logits[..., 0, :], every.logits)
    assert last.exit_scalars is None
    alone = model.train()(ids, labels=ids, asked_exits=[3]).loss
    model.eval()
    assert torch.allclose(alone, model(ids, labels=ids, early_exit=False).loss)
    for wrong in ([0, 1], [2, 0, 3], [0, 0, 3], [], [0, 4]):
        with pytest.raises(UsageError, match="asked_exits"):
            model(ids, early_exit=False, asked_exits=wrong)


def test_early_exits_learn_with_the_network_and_the_result_is_a_plain_model(writer, arguments, tmp_path):  # noqa: F811
    """Loss and agreement of every exit are logged; with closed exits its ids are those of the stock class on its folder."""
    from transformers import BertTokenizer

    from tests.captions.toy import VOCABULARY

    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)})
    tokenizer.eos_token = "[SEP]"
    texts = [" ".join(f"w{5 + (start + 3 * place) % 30}" for place in range(20)) for start in range(40)]
    rows = ee.training.pack_texts(texts, tokenizer, length=21)
    model = writer("qwen3", exit_head="tied")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"layer_dropout": 0.2, "rotation": 2}
    settings = {"objective": "layerskip", "objective_options": options, "max_steps": 60, "learning_rate": 5e-3}
    trainer = trainer_of(model, arguments(**settings), rows[:32], rows[32:])
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    for layer in EXITS:
        assert {f"eval_exit_{layer}_loss", f"eval_exit_{layer}_agreement"} <= set(last)
        assert last[f"eval_exit_{layer}_loss"] < first[f"eval_exit_{layer}_loss"] - 0.5
    assert last["eval_exit_3_agreement"] > first["eval_exit_3_agreement"] + 0.3
    assert last[f"eval_exit_{LAYERS}_agreement"] == 1
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert same == [], "the whole network learns"
    model.eval().save_pretrained(tmp_path / "saved")
    stock = stock_class("qwen3").from_pretrained(tmp_path / "saved")
    ours = ee.from_pretrained(tmp_path / "saved")
    ours.set_exit_policy(ee.ConfidencePolicy(thresholds=(None,) * (LAYERS - 1)))
    ids, mask = prompts(3, 4, padding=(2,))
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": PAD}
    expected = stock.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options), expected)
    ours.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.3,) * (LAYERS - 1)))
    drafted = ours.generate(ids, lossless=True, return_exit_layers=True, **options)
    assert torch.equal(drafted.sequences, expected)
    assert sum(drafted.draft_counts.drafted) > 0


@pytest.mark.parametrize(("curriculum", "head"), [("rotational", "tied"), ("gradual", "tuned")])
def test_a_stopped_run_ends_with_the_same_weights(writer, arguments, tmp_path, curriculum, head):  # noqa: F811
    """To the bit, dropout of the network's own included: GPT-2 has some. Heads that were not taught yet are no damage."""
    fields = {"exit_head": head, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    options = {"layer_dropout": 0.5, "curriculum": curriculum}
    settings = {"objective": "layerskip", "objective_options": options, "max_steps": 6, "output_dir": str(tmp_path),
                "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2}  # fmt: skip
    whole, again = writer("gpt2", **fields), writer("gpt2", **fields)
    rows = samples(whole)[0]
    trainer_of(whole, arguments(**settings), rows).train()
    for step in (2, 3, 4, 5, 6):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"later-{step}")
    trainer = trainer_of(again, arguments(**settings), rows)
    assert trainer.newest_checkpoint() == tmp_path / "checkpoint-1"
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


def test_what_is_dropped_depends_on_the_step(writer, arguments, monkeypatch):  # noqa: F811
    """One row again and again passes over other layers at each step, and over the same in a second run."""
    from hf_earlyexit.training import token_trainer

    model, seen = writer("llama", exit_head="tied"), []
    rows = samples(model, 1)[0]

    def spy(*given):
        seen.append(dropped_layers(*given))
        return seen[-1]

    monkeypatch.setattr(token_trainer, "dropped_layers", spy)
    settings = {"objective": "layerskip", "objective_options": {"layer_dropout": 0.8}, "max_steps": 12}
    for _ in range(2):
        trainer_of(model, arguments(**settings), rows).train()
    masks = [tuple(one.flatten().tolist()) for one in seen]
    assert len(masks) == 24
    assert masks[:12] == masks[12:]
    assert len(set(masks[:12])) > 2


def test_gates_and_the_last_phase_drop_nothing(writer, arguments, monkeypatch):  # noqa: F811
    from hf_earlyexit.training.chosen import ChosenTokenTrainer

    model = writer("llama", exit_gate="linear")
    rows = samples(model)[0]
    monkeypatch.setattr("hf_earlyexit.training.token_trainer.dropping", None)
    settings = arguments(objective="layerskip", max_steps=1)
    trainer = ee.training.EarlyExitLanguageModelTrainer(model, settings, learn_gates=True, train_dataset=rows)
    trainer.train()
    assert ChosenTokenTrainer._chances_to_drop(trainer) is None


def test_what_it_is_not_for_is_refused(writer, arguments, tiny_model, tokenizer):  # noqa: F811
    from tests.training.conftest import make_rows

    with pytest.raises(TrainingError, match="for models that write") as caught:
        ee.EarlyExitTrainer(
            tiny_model(), arguments(objective="layerskip"), train_dataset=make_rows(8), processing_class=tokenizer
        )
    assert caught.value.field == "objective"
    args = arguments(objective="layerskip")
    args._n_gpu = 2
    with pytest.raises(TrainingError, match="DataParallel"):
        trainer_of(writer("llama"), args, [{"input_ids": [4, 5, 6]}])
    with pytest.raises(TrainingError, match="layer_dropout is 3"):
        arguments(objective="layerskip", objective_options={"layer_dropout": 3})

"""One forward pass: which answers, which fields, which modes, and nothing left behind."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.modeling.outputs import EarlyExitClassifierOutput

MULTI = "multi_label_classification"
CLOSED = ee.ConfidencePolicy(thresholds=[None, None, None])


@pytest.fixture
def model(tiny_model, open_policy):
    """A model that exits early by confidence."""
    made = tiny_model()
    made.set_exit_policy(open_policy(made, "confidence"))
    return made


def as_stock(model):
    """The stock classifier with the same weights, taken from the same kind of attention."""
    values = {
        k: v
        for k, v in model.config.to_dict().items()
        if k in BertConfig().to_dict() and k not in ("model_type", "architectures")
    }
    stock = BertForSequenceClassification._from_config(
        BertConfig(**values), attn_implementation=model.config._attn_implementation
    ).eval()
    left_over = stock.load_state_dict(model.state_dict(), strict=False)
    assert not left_over.missing_keys
    return stock


def run(model, batch, **kwargs):
    with torch.inference_mode():
        return model(**batch, **kwargs)


# --- the full model's answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_closed_exits_give_the_stock_answers(tiny_model, random_batch, attention):
    model = tiny_model(attn_implementation=attention)
    model.set_exit_policy(CLOSED)
    stock = as_stock(model)
    batch = random_batch(32)
    early = run(model, batch)
    assert (early.logits - run(stock, batch).logits).abs().max() <= 1e-6
    assert early.exit_layer.tolist() == [4] * 32
    for row in range(8):
        single = {name: value[row : row + 1] for name, value in batch.items()}
        assert torch.equal(run(model, single).logits, run(stock, single).logits)


def test_a_model_without_policy_runs_in_full(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(8)
    output = run(model, batch)
    assert torch.equal(output.logits, run(as_stock(model), batch).logits)
    assert output.exit_layer.tolist() == [4] * 8
    assert output.exit_score is None


# --- outputs and modes --------------------------------------------------------------------------------------------------


def test_early_answers_come_with_layers_and_scores(model, random_batch):
    batch = random_batch(64)
    output = run(model, batch)
    assert type(output) is EarlyExitClassifierOutput
    assert output.logits.shape == (64, 3)
    assert (output.exit_layer.shape, output.exit_layer.dtype) == ((64,), torch.long)
    assert (output.exit_score.shape, output.exit_score.dtype) == ((64,), torch.float32)
    assert len(set(output.exit_layer.tolist())) >= 3
    assert output.loss is output.exit_logits is output.hidden_states is output.attentions is None
    every = run(model, batch, early_exit=False)
    chosen = every.exit_logits[torch.arange(64), output.exit_layer - 1]
    assert (output.logits - chosen).abs().max() <= 1e-5
    assert (output.exit_score - chosen.softmax(-1).amax(-1)).abs().max() <= 1e-5


def test_a_full_pass_tells_every_exit(model, random_batch):
    output = run(model, random_batch(8), early_exit=False)
    assert type(output) is EarlyExitClassifierOutput
    assert output.exit_logits.shape == (8, 4, 3)
    assert torch.equal(output.exit_logits[:, -1], output.logits)
    assert output.exit_layer.tolist() == [4] * 8
    assert output.exit_score is output.loss is None


def test_exit_layers_are_layers_and_not_indices(tiny_model, open_policy, random_batch):
    model = tiny_model(exit_layers=[2, 4])
    model.set_exit_policy(open_policy(model, "confidence"))
    output = run(model, random_batch(64))
    assert set(output.exit_layer.tolist()) == {2, 4}
    assert run(model, random_batch(8), early_exit=False).exit_logits.shape == (8, 2, 3)


def test_early_exit_insists_forbids_or_follows_the_policy(model, random_batch):
    batch = random_batch(32)
    insisted, followed = run(model, batch, early_exit=True), run(model, batch, early_exit=None)
    assert torch.equal(insisted.logits, followed.logits)
    assert insisted.exit_layer.float().mean() < 4
    assert run(model, batch, early_exit=False).exit_layer.tolist() == [4] * 32
    model.set_exit_policy(None)
    assert run(model, batch).exit_logits is not None
    with pytest.raises(UsageError, match="no policy is set; calibrate first") as caught:
        run(model, batch, early_exit=True)
    assert caught.value.field == "early_exit"


def test_training_runs_every_exit_and_refuses_to_exit_early(model, random_batch):
    model.train()
    output = model(**random_batch(8), labels=torch.arange(8) % 3)
    assert output.exit_logits.shape == (8, 4, 3)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.exit_heads.parameters())
    with pytest.raises(UsageError, match=r"training mode.*model\.eval\(\)"):
        model(**random_batch(8), early_exit=True)


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_early_exit_with_hidden_states_is_refused(model, random_batch, flag):
    with pytest.raises(UsageError, match=f"{flag} with early exit.*early_exit=False"):
        run(model, random_batch(4), **{flag: True})
    model.set_attn_implementation("eager")  # sdpa has no attentions to give
    setattr(model.config, flag, True)
    with pytest.raises(UsageError, match=flag):
        run(model, random_batch(4))


@pytest.mark.parametrize("early", [True, False])
def test_a_forward_pass_writes_nothing_on_any_module(tiny_model, model, random_batch, early):
    fresh = tiny_model()  # never called, so that a first write shows
    fresh.set_exit_policy(model.exit_policy)

    def everything():
        return {
            name: {k: (v, len(v) if isinstance(v, (dict, list, set)) else 0) for k, v in vars(part).items()}
            for name, part in fresh.named_modules()
        }

    config, before = copy.deepcopy(fresh.config.to_dict()), everything()
    weights = {name: value.clone() for name, value in fresh.state_dict().items()}
    run(fresh, random_batch(8), early_exit=early)
    after = everything()
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.keys() == after[name].keys(), name
        assert all(values[key][0] is after[name][key][0] and values[key][1] == after[name][key][1] for key in values), name
    assert fresh.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items())


# --- labels and losses --------------------------------------------------------------------------------------------------


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels)


def binary_cross_entropy(logits, labels):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)


def squared_error(logits, labels):
    return ((logits.squeeze(-1) - labels) ** 2).mean()


PROBLEMS = [
    ({}, torch.tensor([0, 1, 2, 0]), cross_entropy),
    ({"problem_type": MULTI}, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]), binary_cross_entropy),
    ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0, 0.0]), squared_error),
]


@pytest.mark.parametrize(("fields", "labels", "expected"), PROBLEMS, ids=["single", "multi", "regression"])
def test_the_loss_is_that_of_the_answers_given(tiny_model, random_batch, fields, labels, expected):
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **fields)
    batch = random_batch(4)
    full = run(model, batch, labels=labels)
    assert full.loss.item() == pytest.approx(expected(full.logits, labels).item(), rel=1e-5)
    assert full.loss.item() == pytest.approx(run(as_stock(model), batch, labels=labels).loss.item(), rel=1e-5)

    model.set_exit_policy(ee.policies.StaticPolicy.at(1, 4, problem_type=model.config.resolved_problem_type))
    early = run(model, batch, labels=labels)
    assert early.exit_layer.tolist() == [2] * 4
    assert early.loss.item() == pytest.approx(expected(early.logits, labels).item(), rel=1e-5)
    assert early.loss.item() != pytest.approx(full.loss.item(), rel=1e-3)

    trained = model.train()(**batch, labels=labels)
    by_hand = sum(layer * expected(trained.exit_logits[:, layer - 1], labels) for layer in (1, 2, 3, 4)) / 10
    assert trained.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert model.config.problem_type == fields.get("problem_type")  # the stock class writes it into the config


def test_whole_number_labels_for_one_output_are_refused(tiny_model, random_batch):
    with pytest.raises(DataError, match=r"num_labels.*problem_type='regression'"):
        run(tiny_model(num_labels=1), random_batch(4), labels=torch.tensor([0, 1, 0, 1]))


def test_the_loss_comes_first_in_tuples_as_in_the_stock_model(model, random_batch):
    batch, labels = random_batch(4), torch.tensor([0, 1, 2, 0])
    as_tuple, as_output = run(model, batch, labels=labels, return_dict=False), run(model, batch, labels=labels)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], as_output.loss)
    assert torch.equal(as_tuple[1], as_output.logits)
    assert list(as_output)[:2] == ["loss", "logits"]


def test_return_dict_false_gives_the_logits_first(model, random_batch):
    batch = random_batch(4)
    for early in (True, False):
        as_tuple = run(model, batch, return_dict=False, early_exit=early)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], run(model, batch, early_exit=early).logits)


# --- what users of transformers expect ----------------------------------------------------------------------------------


def test_hidden_states_are_those_of_the_stock_model(model, random_batch):
    batch = random_batch(6)
    ours = run(model, batch, output_hidden_states=True, early_exit=False).hidden_states
    theirs = run(as_stock(model), batch, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 5
    assert all(torch.equal(own, stock) for own, stock in zip(ours, theirs, strict=True))


def test_attentions_are_those_of_the_stock_model(tiny_model, random_batch):
    model, batch = tiny_model(attn_implementation="eager"), random_batch(6)
    ours = run(model, batch, output_attentions=True).attentions
    theirs = run(as_stock(model), batch, output_attentions=True).attentions
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(own, stock) for own, stock in zip(ours, theirs, strict=True))


def test_embeddings_may_be_given_instead_of_ids(model, random_batch):
    batch = random_batch(16)
    embedded = model.bert.embeddings.word_embeddings(batch["input_ids"]).detach()
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    first, second = run(model, batch), run(model, rest, inputs_embeds=embedded)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.exit_layer, second.exit_layer)
    for wrong in (rest, {**batch, "inputs_embeds": embedded}):
        with pytest.raises(UsageError, match="exactly one of input_ids and inputs_embeds"):
            run(model, wrong)


def test_position_ids_are_used(model, random_batch):
    batch = random_batch(4, padded=False)
    usual = torch.arange(16).expand(4, 16)
    plain = run(model, batch, early_exit=False).logits
    assert torch.equal(run(model, batch, position_ids=usual, early_exit=False).logits, plain)
    assert not torch.equal(run(model, batch, position_ids=usual.flip(1), early_exit=False).logits, plain)


def test_activation_checkpointing_gives_the_same_gradients(tiny_model, random_batch):
    def gradients(checkpointed):
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        runs = []
        model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: runs.append(1))
        model(**random_batch(8), labels=torch.arange(8) % 3).loss.backward()
        assert len(runs) == (2 if checkpointed else 1)  # recomputed in the backward pass
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(plain[name].abs().sum() > 0 for name in plain if name.endswith("classifier.weight"))
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-7) for name in plain)


def test_token_embeddings_can_be_resized(model, random_batch):
    batch = random_batch(8)
    before = run(model, batch)
    model.resize_token_embeddings(120, mean_resizing=False)
    after = run(model, batch)
    assert torch.equal(before.logits, after.logits)
    assert run(model, {"input_ids": torch.full((1, 4), 119)}).logits.shape == (1, 3)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_answer_alike_and_stand_alone(model, random_batch, duplicate):
    batch = random_batch(16)
    before = run(model, batch)
    other = duplicate(model)
    assert torch.equal(run(other, batch).logits, before.logits)
    assert torch.equal(run(other, batch).exit_layer, before.exit_layer)
    other.set_exit_policy(None)
    with torch.no_grad():
        other.classifier.weight.zero_()
    assert torch.equal(run(model, batch).logits, before.logits)


# --- odd inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
def test_inputs_beyond_the_limit_are_refused_with_both_lengths(model, early):
    with pytest.raises(DataError, match=r"65 tokens long; this model takes 1 to 64.*truncation=True") as caught:
        run(model, {"input_ids": torch.full((2, 65), 7)}, early_exit=early)
    assert caught.value.value == 65
    assert run(model, {"input_ids": torch.full((2, 64), 7)}, early_exit=early).logits.shape == (2, 3)


@pytest.mark.parametrize("early", [True, False])
def test_an_empty_batch_gives_an_empty_answer(model, random_batch, early):
    output = run(model, random_batch(0), early_exit=early)
    assert output.logits.shape == (0, 3)
    assert output.exit_layer.shape == (0,)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("early", [True, False])
def test_a_row_without_any_token_gets_a_finite_answer_and_disturbs_nobody(
    tiny_model, open_policy, random_batch, attention, early
):
    model = tiny_model(attn_implementation=attention)
    model.set_exit_policy(open_policy(model, "confidence"))
    batch = random_batch(8)
    before = run(model, batch, early_exit=early)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][3] = 0
    after = run(model, batch, early_exit=early)
    assert torch.isfinite(after.logits).all()
    others = [row for row in range(8) if row != 3]
    assert (before.logits[others] - after.logits[others]).abs().max() <= 1e-6
    assert torch.equal(before.exit_layer[others], after.exit_layer[others])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_four_dimensional_masks_give_the_stock_answers_and_exit_early(tiny_model, open_policy, random_batch, attention):
    model = tiny_model(attn_implementation=attention, exit_head="linear")
    model.set_exit_policy(open_policy(model, "confidence"))
    batch = random_batch(16)
    flat = batch["attention_mask"].bool()
    mask = flat[:, None, None, :].expand(16, 1, 16, 16)
    if attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    four = {**batch, "attention_mask": mask}
    assert torch.equal(run(model, four, early_exit=False).logits, run(as_stock(model), four).logits)
    early, usual = run(model, four), run(model, batch)
    assert len(set(early.exit_layer.tolist())) >= 3
    assert torch.equal(early.exit_layer, usual.exit_layer)
    assert (early.logits - usual.logits).abs().max() <= 1e-5


@pytest.mark.parametrize("head", ["linear-mean", "linear"])
def test_padding_on_the_left_gives_the_stock_answers_and_rows_stay_independent(tiny_model, open_policy, random_batch, head):
    model = tiny_model(exit_head=head)
    model.set_exit_policy(open_policy(model, "confidence"))
    batch = {name: value.flip(1) for name, value in random_batch(24).items()}
    assert torch.equal(run(model, batch, early_exit=False).logits, run(as_stock(model), batch).logits)
    together = run(model, batch)
    assert len(set(together.exit_layer.tolist())) >= 3
    for row in range(24):
        alone = run(model, {name: value[row : row + 1] for name, value in batch.items()})
        assert alone.exit_layer.item() == together.exit_layer[row].item()
        assert (alone.logits[0] - together.logits[row]).abs().max() <= 1e-5


def test_gaps_in_the_mask_are_not_cut_away(model, random_batch):
    batch = random_batch(24)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, 1:3] = 0
    together = run(model, batch)
    assert len(set(together.exit_layer.tolist())) >= 3
    every = run(model, batch, early_exit=False).exit_logits
    assert (together.logits - every[torch.arange(24), together.exit_layer - 1]).abs().max() <= 1e-5


def test_sdpa_and_eager_agree(tiny_model, open_policy, random_batch):
    fast, slow = tiny_model(), tiny_model(attn_implementation="eager")
    assert (fast.config._attn_implementation, slow.config._attn_implementation) == ("sdpa", "eager")
    policy = open_policy(fast, "confidence")
    batch = random_batch(64)
    outputs = []
    for model in (fast, slow):
        model.set_exit_policy(policy)
        outputs.append(run(model, batch))
    assert torch.equal(outputs[0].exit_layer, outputs[1].exit_layer)
    assert (outputs[0].logits - outputs[1].logits).abs().max() <= 1e-5


def test_flex_attention_is_refused_with_the_way_out(model, random_batch):
    model.config._attn_implementation = "flex_attention"
    # Refused before its mask is made: making one compiles for seconds.
    with pytest.raises(UsageError, match=r"'flex_attention' has no plain mask.*'sdpa' or 'eager'"):
        run(model, random_batch(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_decides_in_float32(model, random_batch, dtype):
    model = model.to(dtype)
    output = run(model, random_batch(64))
    assert output.logits.dtype == dtype
    assert output.exit_score.dtype == torch.float32
    assert torch.isfinite(output.logits).all()
    assert len(set(output.exit_layer.tolist())) >= 3
    expected = output.logits.float().softmax(-1).amax(-1)
    assert (output.exit_score - expected).abs().max() <= 1e-6


def test_autocast_runs(model, random_batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, random_batch(32))
    assert torch.isfinite(output.logits).all()
    assert len(set(output.exit_layer.tolist())) >= 2


def test_eight_threads_share_one_model(model, random_batch):
    batches = [random_batch(rows, seed=rows) for rows in (1, 2, 3, 5, 8, 13)]
    expected = [run(model, batch) for batch in batches]
    assert len({layer for output in expected for layer in output.exit_layer.tolist()}) >= 3

    def call(number):
        got, want = run(model, batches[number % 6]), expected[number % 6]
        return torch.equal(got.logits, want.logits) and torch.equal(got.exit_layer, want.exit_layer)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(call, range(300))) == 300


# --- other problem types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"problem_type": MULTI}, {"num_labels": 1}], ids=["multi", "regression"])
def test_patience_serves_every_problem_type(tiny_model, open_policy, random_batch, fields):
    model = tiny_model(**fields)
    policy = open_policy(model, "patience").with_thresholds(1.0)
    model.set_exit_policy(policy)
    batch = random_batch(48)
    output = run(model, batch)
    assert len(set(output.exit_layer.tolist())) >= 2
    every = run(model, batch, early_exit=False).exit_logits
    for row, layer in enumerate(output.exit_layer.tolist()):  # by hand: the first exit that says what the one before said
        if fields == {"num_labels": 1}:
            steady = [bool((every[row, i] - every[row, i - 1]).abs() <= policy.tolerance) for i in range(1, 4)]
        else:
            steady = [bool(((every[row, i] > 0) == (every[row, i - 1] > 0)).all()) for i in range(1, 4)]
        assert layer == (steady.index(True) + 2 if True in steady else 4)


def test_confidence_on_regression_is_refused_with_what_fits(tiny_model):
    with pytest.raises(ee.EarlyExitError, match="cannot serve regression; these can: gate, patience"):
        tiny_model(num_labels=1).set_exit_policy(ee.ConfidencePolicy(thresholds=[0.5] * 3, problem_type="regression"))


@pytest.mark.parametrize("early", [None, False])
def test_masks_that_do_not_tell_what_to_average_are_refused(tiny_model, open_policy, random_batch, early):
    batch = random_batch(4)
    four = {**batch, "attention_mask": batch["attention_mask"].bool()[:, None, None].expand(4, 1, 16, 16)}
    for head, refused in (("linear-mean", True), ("linear-cls", False)):
        model = tiny_model(exit_head=head)
        model.set_exit_policy(open_policy(model, "confidence"))
        if refused:
            with pytest.raises(DataError, match=r"attention_mask has shape \[4, 1, 16, 16\].*layers 1, 2, 3 which tokens"):
                run(model, four, early_exit=early)
        else:
            assert (
                run(model, four, early_exit=early).logits - run(model, batch, early_exit=early).logits
            ).abs().max() <= 1e-5

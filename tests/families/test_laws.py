"""What every family keeps, over the whole table: nothing here knows which families there are."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

import hf_earlyexit as ee
import hf_earlyexit.modeling.exits
import hf_earlyexit.modeling.fingerprint
from hf_earlyexit import doors
from hf_earlyexit.errors import CheckpointError, DataError, EarlyExitConfigError, UsageError
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import IMAGE, LAST
from hf_earlyexit.modeling.heads import HEADS
from hf_earlyexit.modeling.tasks import TASKS
from hf_earlyexit.serving.bf16 import to_bf16
from hf_earlyexit.serving.int8 import Int8Linear
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.training.weights import load_weights
from hf_earlyexit.walking.loop import run_all

from .tiny import (
    CAUSAL,
    IMAGES,
    MORE,
    PACKED,
    PAD,
    TEXTS,
    VOCABULARY,
    batch_of,
    door,
    fields,
    new_model,
    rows_of,
    stock_class,
    stock_of,
    tiny,
)

every = pytest.mark.parametrize("name", FAMILIES)
text = pytest.mark.parametrize("name", TEXTS)
image = pytest.mark.parametrize("name", IMAGES)
PADDINGS = ["right", "left", "none"]


def states_of(model, batch, context=None, keep=None):
    """Hidden states after every layer, walked with rows dropped after the first where `keep` says which stay."""
    family, base = model.family, model.base_model
    with torch.inference_mode():
        hidden, context = family.begin(base, batch, {})
        states = [hidden]
        for number, layer in enumerate(family.layers_of(base)):
            hidden = family.call(layer, hidden, context)
            if number == 0 and keep is not None:
                hidden, context = context.take(hidden, keep, torch.tensor(keep))
            states.append(hidden)
    return states, context


def stock_states(stock, batch):
    """What enters and leaves each layer of the stock model, in the order of the calls."""
    family_layers, states, handles = [], [], []
    for layer in FAMILIES[stock.config.model_type].layers_of(stock.base_model):
        if layer not in family_layers:
            family_layers.append(layer)
            handles.append(layer.register_forward_hook(lambda _, given, out: states.append((given, out))))
    with torch.inference_mode():
        logits = stock(**batch).logits
    for handle in handles:
        handle.remove()
    return [out[0] if isinstance(out, tuple) else out for _, out in states], logits


# --- the stock model's numbers ------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("padding", PADDINGS)
def test_stepping_gives_the_stock_models_states_and_answers_to_the_bit(name, padding):
    model, batch = tiny(name), batch_of(name, padding=padding)
    expected, logits = stock_states(stock_of(model, name), batch)
    states, _ = states_of(model, batch)
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, logits)
    if name == "deberta-v2":  # its convolution comes between the first layer and the second
        states, expected = states[1:], expected[1:]
    assert len(states[1:]) == len(expected)
    assert all(torch.equal(state, stock) for state, stock in zip(states[1:], expected, strict=True))


@text
@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_embeddings_and_segments_that_are_given_count_as_in_the_stock_model(name, padding):
    model = tiny(name)
    stock, batch = stock_of(model, name), batch_of(name, padding=padding)
    places = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0) + (2 if FAMILIES[name].positions else 0)
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(batch["input_ids"])
    kinds = {
        "position_ids": {**batch, "position_ids": places},
        "inputs_embeds": {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]},
    }
    if "token_type_ids" in FAMILIES[name].inputs and name not in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        kinds["token_type_ids"] = {**batch, "token_type_ids": (torch.arange(12) > 3).long().expand(6, -1)}
    for kind, given in kinds.items():
        with torch.inference_mode():
            found, expected = model(**given).logits, stock(**given).logits
            plain = model(**batch).logits
        assert torch.equal(found, expected), kind
        if kind == "token_type_ids" and getattr(model.config, "type_vocab_size", 2) > 0:
            assert not torch.equal(found, plain), kind


@every
def test_rows_that_are_dropped_midway_change_nothing(name):
    model, keep = tiny(name), [3, 1, 5]  # the longest row is not among them
    for padding in PADDINGS:
        batch = batch_of(name, padding=padding)
        states, before = states_of(model, batch)
        kept, context = states_of(model, batch, keep=keep)
        assert all(torch.equal(context.kept[part], value[keep]) for part, value in before.kept.items())
        whole, part = states[-1][keep], kept[-1]
        real = torch.ones(part.shape[:2], dtype=torch.bool) if context.tokens is None else context.tokens
        whole = whole[:, : part.shape[1]]
        assert (whole - part).abs().amax(-1)[real].max() <= 2e-6 * whole.abs().max()
        if padding == "none" or FAMILIES[name].task == IMAGE:
            assert torch.equal(whole, part)
        elif padding == "right":
            assert part.shape[1] == int(batch["attention_mask"][keep].sum(1).max())  # padding is cut


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (name, head)
        for name in PACKED
        for head in HEADS.names()
        if FAMILIES[name].pool is not None or not HEADS.get(head).borrows_pooler
    ],
)
def test_packed_rows_give_the_padded_ones_numbers(name, head):
    model, batch = tiny(name, exit_head=head), batch_of(name, rows=9, seed=3)
    walker = ModelWalker(model)
    assert walker.packs
    with torch.inference_mode():
        expected = model(**batch, early_exit=False).exit_logits
        hidden, context = walker.begin(rows_of(batch))
        assert hidden.shape == (int(batch["attention_mask"].sum()), 32)
        found, _ = run_all(walker, hidden, context, 3)
    assert (found - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_can_be_dropped_and_joined(name):
    model = tiny(name)
    walker, rows = ModelWalker(model), rows_of(batch_of(name, rows=8, seed=5))
    with torch.inference_mode():
        whole = model(**batch_of(name, rows=8, seed=5), early_exit=False).exit_logits[:, -1]
        parts = []
        for some in (rows[:5], rows[5:]):
            hidden, context = walker.begin(some)
            hidden = walker.run_layer(1, hidden, context)
            stay = [row for row in range(len(some)) if row != 1]
            parts.append(context.take(hidden, stay, torch.tensor(stay)))
        hidden, context = walker.join(parts)
        for layer in range(2, model.exit_layers[-1] + 1):
            hidden = walker.run_layer(layer, hidden, context)
        found = walker.exit_signal(len(model.exit_layers) - 1, hidden, context).logits
    assert (found - whole[[0, 2, 3, 4, 5, 7]]).abs().max() <= 1e-5 * max(1, float(whole.abs().max()))


@every
def test_rows_that_are_padded_say_why(name):
    family = FAMILIES[name]
    model, plain = tiny(name), new_model(name, attn_implementation="eager")
    reasons = [family.why_padded(one.base_model) for one in (model, plain)]
    if name in IMAGES or name in PACKED:
        assert reasons[0] is None
        assert (reasons[1] is None) == (name in IMAGES)
        assert name in IMAGES or "attn_implementation='eager'" in reasons[1]
    else:
        assert reasons == [f"{family.name} layers compute attention in a way of their own"] * 2


@text
def test_padded_rows_can_be_joined(name):
    model = tiny(name)
    walker, rows = ModelWalker(model, pack=False), rows_of(batch_of(name, rows=8, seed=5))
    with torch.inference_mode():
        whole = model(**batch_of(name, rows=8, seed=5), early_exit=False).exit_logits[:, -1]
        parts = [walker.begin(some) for some in (rows[:1], rows[1:])]
        parts = [(walker.run_layer(1, *part), part[1]) for part in parts]
        hidden, context = walker.join(parts)
        for layer in range(2, model.exit_layers[-1] + 1):
            hidden = walker.run_layer(layer, hidden, context)
        found = walker.exit_signal(len(model.exit_layers) - 1, hidden, context).logits
    assert (found - whole).abs().max() <= 1e-5 * max(1, float(whole.abs().max()))


# --- what can be read ---------------------------------------------------------------------------------------------------


def reads(stock, length):
    """Whether a stock model takes that many tokens."""
    try:
        with torch.inference_mode():
            stock(input_ids=torch.full((1, length), VOCABULARY - 1))
    except (IndexError, RuntimeError):
        return False
    return True


@text
def test_one_token_and_the_longest_input_are_read_and_one_more_is_refused(name):
    model, stock = tiny(name), stock_of(tiny(name), name)
    longest = FAMILIES[name].longest(model.config)
    assert longest == next(length for length in range(40, 0, -1) if reads(stock, length))  # of the 40 its config speaks of
    for length in (1, longest):
        ids = torch.randint(PAD + 1, VOCABULARY, (2, length))
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    for length in (0, longest + 1):
        with pytest.raises(DataError, match=f"{length} tokens long; this model takes 1 to {longest}"):
            model(input_ids=torch.full((1, length), 5))


@image
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 24, 16)])
def test_images_of_another_shape_are_refused_in_words_or_read_as_the_stock_model_does(name, shape):
    model, pixels = tiny(name), torch.zeros(shape)
    if name.startswith("dinov2") and shape[:2] == (2, 3):  # fits its positions to every image
        with torch.inference_mode():
            assert torch.equal(model(pixel_values=pixels).logits, stock_of(model, name)(pixel_values=pixels).logits)
        return
    with pytest.raises(DataError, match=r"expected \[images, 3, "):
        model(pixel_values=pixels)


@image
def test_positions_are_fitted_to_larger_images_as_in_the_stock_model_or_the_size_is_refused(name):
    model, pixels = tiny(name), torch.randn(2, 3, 24, 24)
    given = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    if name == "beit":  # whose table of relative places would have to be fitted in every layer
        with pytest.raises(DataError, match=r"\[2, 3, 24, 24\]; expected \[images, 3, 16, 16\]"):
            model(**given)
        return
    stock = stock_of(model, name)
    with torch.inference_mode():
        assert torch.equal(model(**given).logits, (stock(pixels) if name.startswith("dinov2") else stock(**given)).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_several_rows_need_a_padding_token_to_find_the_last_real_one(name):
    model = new_model(name, pad_token_id=None)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)
    with pytest.raises(UsageError, match="pad_token_id"):
        model(input_ids=torch.tensor([[5, 6, 7], [5, 6, 7]]))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_padding_token_at_the_end_of_a_real_row_is_passed_over_as_in_the_stock_model(name):
    model, ids = tiny(name), torch.tensor([[5, 6, 7, PAD], [8, 9, 10, 11]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    walker = ModelWalker(model)
    with torch.inference_mode():
        expected = stock_of(model, name)(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        found, _ = run_all(walker, *walker.begin([{"input_ids": row.tolist()} for row in ids]), 3)
    assert (found[:, -1] - expected).abs().max() <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "mpnet"])
def test_a_padding_token_that_no_vocabulary_has_pads_nothing(name):
    """Some checkpoints of Llama say -1."""
    model, rows = new_model(name, pad_token_id=-1), rows_of(batch_of(name, rows=9, seed=2))
    alone = torch.cat([ee.predict(model, [row], early_exit=False).logits for row in rows])
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    for found in (ee.predict(model, rows, early_exit=False).logits, trace.logits[:, -1]):
        assert (found - alone).abs().max() <= 1e-5 * max(1, float(alone.abs().max()))


@every
def test_heads_that_borrow_a_pooler_are_refused_where_there_is_none(name):
    borrowing = [head for head in HEADS.names() if HEADS.get(head).borrows_pooler]
    for head in borrowing:
        if FAMILIES[name].pool is None:
            with pytest.raises(EarlyExitConfigError, match=f"{FAMILIES[name].name} models have no pooler to borrow"):
                door(name).config_class(**fields(name, exit_head=head))
        else:
            with torch.inference_mode():
                assert tiny(name, exit_head=head)(**batch_of(name)).exit_logits.isfinite().all()


# --- classes and folders ------------------------------------------------------------------------------------------------


@every
def test_a_saved_model_is_the_same_for_everybody_who_reads_it(name, tmp_path):
    model, batch = tiny(name), batch_of(name)
    model.save_pretrained(tmp_path)
    auto = TASKS[FAMILIES[name].task].auto_model
    readers = [door(name), AutoModel, getattr(__import__("transformers"), auto), ee, stock_class(name)]
    with torch.inference_mode():
        expected = model(**batch).logits
        for reader in readers:
            read = reader.from_pretrained(tmp_path).eval()
            assert isinstance(read, stock_class(name))
            assert torch.equal(read(**batch).logits, expected)
    assert type(AutoConfig.from_pretrained(tmp_path)) is door(name).config_class


@every
def test_weights_of_a_checkpoint_are_taken_up_whole_whatever_their_names_in_the_file(name, tmp_path):
    model, other = tiny(name), new_model(name, seed=1)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@every
def test_a_plain_checkpoint_gets_exits(name, tmp_path):
    stock, batch = stock_of(tiny(name), name), batch_of(name)
    stock.save_pretrained(tmp_path)
    model = ee.from_pretrained(tmp_path, task=FAMILIES[name].task).eval()
    assert type(model) is door(name)
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)


@every
def test_classes_have_the_names_they_say_and_can_be_pickled(name):
    for made in (door(name), door(name).config_class):
        assert getattr(ee, made.__name__) is made is getattr(doors, made.__name__)
        assert made.__name__ in dir(ee)
        assert pickle.loads(pickle.dumps(made)) is made
    config = tiny(name).config
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict() == copy.deepcopy(config).to_dict()


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "~/model"])
def test_a_folder_that_is_not_there_is_told_as_such(name):
    with pytest.raises(CheckpointError, match=f"There is no folder {name}; expected a folder or a Hub id"):
        ee.from_pretrained(name)


def test_what_has_no_exits_is_refused_with_the_list_of_what_has(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"type 't5'; types that can have exits are bert, roberta, .*vit.*qwen3"):
        ee.from_pretrained(tmp_path)
    door("bert").config_class().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="do 'text-classification' here"):
        ee.from_pretrained(tmp_path, task="image-classification")
    for name in (None, 5, AutoConfig.for_model("t5")):
        with pytest.raises(UsageError, match="expected a folder or a Hub id"):
            ee.from_pretrained(name)


@every
def test_a_certificate_is_refused_for_any_part_that_is_changed(name, tmp_path):
    model = new_model(name)
    logits = torch.randn(40, len(model.exit_layers), 3)
    trace = ee.ExitTrace(
        logits=logits, labels=logits[:, -1].argmax(-1), exit_layers=model.exit_layers,
        fingerprint=ee.modeling.fingerprint.model_fingerprint(model),
    )  # fmt: skip
    model.set_exit_policy(ee.calibrate(trace, "confidence", target=ee.SpeedUp(1.2), keep_weak_exits=True))
    model.save_pretrained(tmp_path)
    policy, certificate = model.config.exit_policy, model.config.exit_certificate
    layers = {id(part) for layer in model.family.layers_of(model.base_model) for part in layer.modules()}
    places = [path for path, part in model.named_modules() if list(part.parameters(recurse=False))]
    outside = [path for path in places if id(model.get_submodule(path)) not in layers]
    assert any("classifier" in path or "score" in path for path in outside)
    for path in [*outside, next(path for path in reversed(places) if path not in outside)]:  # of the layers' parts, the last
        changed = copy.deepcopy(model)
        with torch.no_grad():
            next(changed.get_submodule(path).parameters()).flatten()[0] += 1
        super(ee.modeling.exits.ModelWithExits, changed).save_pretrained(tmp_path)  # as somebody who knows no certificates
        with pytest.raises(CheckpointError, match="were chosen on another model"):
            door(name).from_pretrained(tmp_path)
    assert (policy, certificate) == (changed.config.exit_policy, changed.config.exit_certificate)


# --- copies ---------------------------------------------------------------------------------------------------------------


@every
def test_int8_copies_round_every_map_of_every_layer_and_serve(name):
    model, batch = tiny(name), batch_of(name)
    small = ee.quantize_int8(model)
    maps = (nn.Linear, Conv1D)
    for layer, rounded in zip(
        model.family.layers_of(model.base_model), small.family.layers_of(small.base_model), strict=True
    ):
        places = [path for path, part in layer.named_modules() if isinstance(part, maps)]
        assert places
        assert all(type(rounded.get_submodule(path)) is Int8Linear for path in places)
        assert not [part for part in rounded.modules() if isinstance(part, maps)]
    with torch.inference_mode():
        whole, found = model(**batch).logits, small(**batch).logits
    assert (whole - found).norm() <= 0.2 * whole.norm()


@every
def test_bf16_copies_round_every_layer_and_nothing_else_and_serve(name, open_policy_of):
    model, batch = tiny(name), batch_of(name, rows=24, seed=9)
    copied = to_bf16(model)
    layers = [part for layer in copied.family.layers_of(copied.base_model) for part in layer.parameters()]
    assert {part.dtype for part in layers} <= {torch.bfloat16}
    between = {"encoder"} if name == "deberta-v2" else set()
    others = [path for path, part in copied.base_model.named_parameters() if part.dtype == torch.bfloat16]
    others = [path for path in others if not any(copied.base_model.get_parameter(path) is part for part in layers)]
    assert {path.partition(".conv.")[0] for path in others} == between
    assert {part.dtype for part in copied.exit_heads.parameters()} == {torch.float32}
    with torch.inference_mode():
        whole, found = model(**batch, early_exit=False).exit_logits, copied(**batch).exit_logits
        policy, scores, _ = open_policy_of(copied, batch, "confidence")
        copied.set_exit_policy(policy)
        served = copied(**batch)
    assert found.dtype == served.logits.dtype == torch.float32
    assert 0 < (whole - found).norm() <= 0.2 * whole.norm()
    exits = policy.decide(scores)
    near = (scores - torch.tensor([*policy.thresholds, 0.0])).abs().amin(1) < 0.01  # padded rows differ by a rounding
    moved = served.exit_layer != torch.tensor(model.exit_layers)[exits]
    assert not (moved & ~near).any()
    images = name in IMAGES
    predictions = ee.predict(copied, [{"pixel_values": one} for one in batch["pixel_values"]] if images else rows_of(batch))
    assert not ((predictions.exit_layer != served.exit_layer) & ~near).any()
    assert predictions.form == "bf16"


def test_the_shapes_of_this_file_name_no_family_that_is_gone():
    assert set(MORE) <= set(FAMILIES)
    assert {LAST} == {FAMILIES[name].token for name in CAUSAL}

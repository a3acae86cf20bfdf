"""Drafts of captioners: chosen on pictures, kept as an operating point of their own, loaded, used; captions stay whole."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import CalibrationError, EarlyExitConfigError, UsageError
from hf_earlyexit.families import decoders
from hf_earlyexit.families.decoders import cache_name
from hf_earlyexit.families.plain_gpt2 import is_plain
from hf_earlyexit.generation.draft_calibration import LAYER_CALLS, measure_costs
from hf_earlyexit.generation.draft_trace import DraftCosts, replay_drafts, trace_drafts
from hf_earlyexit.generation.full_texts import written_texts
from hf_earlyexit.generation.lossless import LosslessWalker
from tests.captions.conftest import LAYERS, START
from tests.captions.toy import make_image_processor, make_pictures

KINDS = ["gpt2", "bert"]
NEW = 12
WRITING = {"max_new_tokens": NEW, "eos_token_id": None}
UNIT = DraftCosts(layer=1, more=0.25, ask=0.1, words=2, more_words=0.5)


@pytest.fixture
def drafter(captioner, mixed):
    """`drafter(kind, **fields)`: a captioner of which some drafts are right: its upper layers change little."""

    def make(kind="gpt2", share=0.6, **fields):
        model = captioner(kind, **{"exit_layers": [1, 2, LAYERS], **fields})
        with torch.no_grad():
            for layer in model.backbone.layers(model.decoder)[1:]:
                for name, weight in layer.named_parameters():
                    if name.endswith(("c_proj.weight", "output.dense.weight")):
                        weight *= 0.2 if kind == "gpt2" else 0.03
        model.set_exit_policy(mixed(model, "confidence", share=share))
        return model

    return make


def chosen(model, rows, **options):
    usual = {"drafts": (1, 3), "levels": 4, "costs": LAYER_CALLS, "confirm": False, **WRITING}
    return ee.generation.calibrate_drafts(model, rows, **{**usual, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_expects_what_real_captions_cost(drafter, images, kind):
    """One draft at a time: every call of a layer and every draft is as in the run, caption by caption."""
    model, pixels = drafter(kind), images(6)
    texts = written_texts(model, model.read_prompts(pixels, None, None, 4), 4, WRITING)
    full = model.generate(pixels, early_exit=False, **WRITING)
    assert [text.ids for text in texts] == full.tolist()
    assert {text.start for text in texts} == {1}
    trace = trace_drafts(model, texts, model.exit_policy)
    assert trace.lengths == (NEW,) * 6, "the token that captions begin with may leave too"
    expected = replay_drafts(trace, model.exit_policy, 1, model.exit_layers, UNIT)
    calls = drafted = accepted = 0
    for picture in pixels:
        output = model.generate(picture[None], lossless=True, max_drafts=1, return_exit_layers=True, **WRITING)
        counts = output.draft_counts
        calls, drafted = calls + counts.layer_calls, drafted + sum(counts.drafted)
        accepted += sum(counts.accepted)
    assert 0 < accepted < drafted
    tokens = 6 * NEW
    assert expected.layer_calls == pytest.approx(calls / tokens)
    assert expected.drafted == pytest.approx(drafted / tokens)
    assert expected.accepted == pytest.approx(accepted / drafted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_knows_where_captions_end(drafter, images, kind):
    """The last token of a caption that ends by itself may leave, and a draft that would end it is checked at once."""
    model, pixels = drafter(kind), images(12)
    free = model.generate(pixels, lossless=True, max_drafts=1, return_exit_layers=True, **WRITING)
    firsts = [  # words that are drafts where a caption has them first
        word
        for ids, layers in zip(free.sequences.tolist(), free.exit_layers.tolist(), strict=True)
        for place, word in enumerate(ids)
        if word not in ids[:place] and 0 < layers[place] < LAYERS
    ]
    ends = sorted({*firsts})[-3:]
    options = {"max_new_tokens": NEW + 4, "eos_token_id": ends}
    texts = written_texts(model, model.read_prompts(pixels, None, None, 4), 4, options)
    trace = trace_drafts(model, texts, model.exit_policy, ends)
    assert 2 < sum(trace.ended) < 12
    assert trace.ends.any()
    assert sum(trace.lengths) == len(trace.scores) == sum(len(text.ids) - 1 for text in texts)
    expected = replay_drafts(trace, model.exit_policy, 1, model.exit_layers, UNIT)
    calls = drafted = accepted = ending = 0
    for picture in pixels:
        output = model.generate(picture[None], lossless=True, max_drafts=1, return_exit_layers=True, **options)
        counts = output.draft_counts
        calls, drafted = calls + counts.layer_calls, drafted + sum(counts.drafted)
        accepted += sum(counts.accepted)
        ending += int(output.exit_layers[0, -1]) < LAYERS
    assert ending > 1, "an end must be a draft"
    tokens = len(trace.scores)
    assert expected.layer_calls == pytest.approx(calls / tokens)
    assert expected.drafted == pytest.approx(drafted / tokens)
    assert expected.accepted == pytest.approx(accepted / drafted)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_chosen_kept_loaded_and_used(drafter, images, tmp_path, kind):
    model = drafter(kind)
    usual, before = model.exit_policy, model.train().config.to_dict()
    found = chosen(model, images(6))
    assert model.config.to_dict() == before, "nothing is written on the model"
    assert model.training, "nor is its mode"
    model.eval()
    assert (found.num_texts, found.num_tokens) == (6, 6 * NEW)
    assert found.policy.may_leave
    assert found.expected.layer_calls == min(one.expected.layer_calls for one in found.settings) < LAYERS
    assert found.policy != usual
    found.serve(model)
    model.save_pretrained(tmp_path)
    again = ee.EarlyExitVisionEncoderDecoder.from_pretrained(tmp_path).eval()
    assert again.policy_at("lossless") == found.policy
    assert again.config.exit_drafts == found.drafts
    assert again.exit_policy == usual, "captions that nobody checks are what they were"
    pixels, options = images(8, seed=5), {**WRITING, "return_exit_layers": True}
    full = again.generate(pixels, early_exit=False, **WRITING)
    drafted = again.generate(pixels, lossless=True, **options)
    assert torch.equal(drafted.sequences, full)
    named = again.generate(pixels, lossless=True, operating_point="lossless", max_drafts=found.drafts, **options)
    assert torch.equal(named.exit_layers, drafted.exit_layers), "lossless runs know where their drafts are kept"
    again.set_exit_policy(None)
    alone = again.generate(pixels, lossless=True, **options)
    assert torch.equal(alone.exit_layers, drafted.exit_layers)
    assert set(again.generate(pixels, **options).exit_layers[:, 1:].flatten().tolist()) == {LAYERS}


def test_pictures_pixels_and_states_give_the_same_drafts(drafter):
    model, pictures, processor = drafter(), make_pictures(4), make_image_processor()
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.encoder(pixel_values=pixels).last_hidden_state
    rows = [{"encoder_hidden_states": one.numpy(), "labels": [5, 6]} for one in states]  # labels are for training
    found = [chosen(model, given, image_processor=processor) for given in (pictures, pixels, rows)]
    assert len({str(one) for one in found}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_measured_and_a_real_run_confirms(drafter, images, kind):
    model = drafter(kind)
    texts = written_texts(model, model.read_prompts(images(2), None, None, 4), 4, WRITING)
    costs = measure_costs(model, model.exit_policy, texts)
    assert min(costs.layer, costs.ask, costs.words, costs.token, costs.draft, costs.plain, costs.prompt) > 0
    assert min(costs.more, costs.more_words) >= 0
    found = chosen(model, images(2), confirm=True)
    assert found.measured_speed_up > 0
    assert "measured" in str(found)


def test_the_first_token_is_no_part_of_the_prompts_cost(drafter, images, monkeypatch):
    model = drafter()
    texts = written_texts(model, model.read_prompts(images(2), None, None, 4), 4, WRITING)
    seconds = [LAYERS * 1.0, LAYERS * 1.75, 0.1, 2.0, 3.5, 0.05, 0.4, 7.0, 10.0]
    monkeypatch.setattr("hf_earlyexit.generation.draft_calibration._seconds", lambda *_: seconds)
    assert measure_costs(model, model.exit_policy, texts).prompt == 3


def test_where_drafts_cost_more_than_they_save_none_are_made(drafter, images):
    dear = DraftCosts(layer=1, more=5, ask=9, words=2, more_words=0)
    found = chosen(drafter(), images(4), costs=dear)
    assert not found.policy.may_leave


def test_what_cannot_be_chosen_is_refused(drafter, images):
    model = drafter()
    for options, error, words in (
        ({"num_beams": 3}, UsageError, "num_beams is 3"),
        ({"pixel_values": images(1)}, UsageError, "images come as rows"),
        ({"decoder_input_ids": torch.tensor([[START]])}, UsageError, "captions start afresh"),
        ({"do_sample": True}, CalibrationError, "greedily"),
        ({"max_new_tokens": 1}, CalibrationError, "No text has a token"),
        ({"policy": "gate"}, EarlyExitConfigError, "the gate policy reads them"),
    ):
        with pytest.raises(error, match=words):
            chosen(model, images(2), **options)
    with pytest.raises(UsageError, match="pass the model's image_processor"):
        chosen(model, make_pictures(2))
    model.generation_config.num_beams = 2
    with pytest.raises(UsageError, match="num_beams is 2"):
        chosen(model, images(2))
    assert chosen(model, images(2), num_beams=1).num_texts == 2


def both(model, pixels, **options):
    """Captions of the full model, and those without loss, in float64, where rounding decides nothing."""
    options = {"max_new_tokens": NEW, **options}
    full = model.generate(pixels, early_exit=False, return_dict_in_generate=True, **options)
    return full, model.generate(pixels, lossless=True, return_exit_layers=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_the_full_models_after_every_acceptance(drafter, images, monkeypatch, kind):
    """Of every layer, whenever drafts are accepted; and every token runs each layer once, that at the start as well."""
    model, pixels, checked = drafter(kind).double(), images(3).double(), []
    full = both(model, pixels, eos_token_id=None)[0]
    layers = full[cache_name(type(full))].self_attention_cache.layers
    check, ran = LosslessWalker._check, [0] * LAYERS

    def checks(self, rows):
        check(self, rows)
        for row in rows:
            end = row.length - 1
            checked.append(end)
            for mine, theirs in zip(self.cache.entries, layers, strict=True):
                for entries, expected in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    apart = entries[row.number, :, :end] - expected[row.number, :, :end]
                    assert apart.abs().max() < 1e-10

    monkeypatch.setattr(LosslessWalker, "_check", checks)
    for index, layer in enumerate(model.backbone.layers(model.decoder)):

        def count(_, given, __, index=index):
            ran[index] += given[0].shape[0] * given[0].shape[1]

        layer.register_forward_hook(count)
    drafted = model.generate(pixels, lossless=True, return_exit_layers=True, **WRITING)
    counts = drafted.draft_counts
    assert torch.equal(drafted.sequences, full.sequences)
    assert len(set(checked)) > 3
    assert ran == counts.layer_tokens
    assert len(set(counts.layer_tokens)) == 1
    assert counts.layer_tokens[0] == counts.checks + sum(counts.drafted)
    assert (drafted.exit_layers[:, 1] < LAYERS).any(), "a first word may be a draft"
    crossed = zip(*(one[cache_name(type(one))].cross_attention_cache.layers for one in (drafted, full)), strict=True)
    for mine, theirs in crossed:
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def test_captions_that_begin_with_more_than_one_token(drafter, images):
    """The pass over a longer beginning brings the first new word along, in full."""
    model, pixels = drafter().double(), images(3).double()
    begun = torch.tensor([[START, 7, 9]] * 3)
    full, drafted = both(model, pixels, eos_token_id=None, decoder_input_ids=begun)
    assert torch.equal(drafted.sequences, full.sequences)
    assert (drafted.exit_layers[:, 3] == LAYERS).all()
    assert sum(drafted.draft_counts.accepted) > 0


@pytest.mark.parametrize("part", ["ln_1", "attn.c_attn", "crossattention.q_attn", "crossattention", "mlp.c_fc", "mlp.act"])
@pytest.mark.parametrize("way", ["watched", "replaced"])
def test_parts_of_layers_that_are_not_plain_are_called(drafter, images, part, way):
    """One of them may be watched, or be of another kind, as adapters make it."""
    model, called = drafter(), []
    layer = model.backbone.layers(model.decoder)[1]
    module = layer.get_submodule(part)
    assert is_plain(layer)
    if way == "watched":
        module.register_forward_hook(lambda *_: called.append(1))
    else:

        class Other(type(module)):
            def forward(self, *args, **kwargs):
                called.append(1)
                return super().forward(*args, **kwargs)

        module.__class__ = Other
    assert is_plain(layer) == (way == "replaced" and part == "mlp.act"), "an activation of any kind is called"
    output = model.generate(images(1), lossless=True, max_drafts=1, return_exit_layers=True, **WRITING)
    assert len(called) >= output.draft_counts.layer_tokens[1] / 2 > 1


def test_layers_that_are_called_as_a_whole_and_in_parts_agree(drafter, images, monkeypatch):
    """On a CPU plain layers are run by their parts; watched ones are called. Rows go apart, and read the cache in place."""
    model, pixels, ran = drafter(), images(8), []
    step = decoders.run_plain
    monkeypatch.setattr(decoders, "run_plain", lambda *args: ran.append(args[2].rows) or step(*args))
    options = {"lossless": True, "max_drafts": 3, "return_exit_layers": True, **WRITING}
    by_parts = model.generate(pixels, **options)
    assert len({None if rows is None else len(rows) for rows in ran}) > 3
    assert len(ran) == by_parts.draft_counts.layer_calls
    ran.clear()
    for layer in model.backbone.layers(model.decoder):
        layer.register_forward_hook(lambda *_: None)
    by_calls = model.generate(pixels, **options)
    assert not ran
    assert torch.equal(by_parts.sequences, by_calls.sequences)
    assert torch.equal(by_parts.exit_layers, by_calls.exit_layers)
    assert by_parts.draft_counts == by_calls.draft_counts
    caches = [one[cache_name(type(one))].self_attention_cache.layers for one in (by_parts, by_calls)]
    for mine, theirs in zip(*caches, strict=True):
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-5)
        assert torch.allclose(mine.values, theirs.values, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_and_limits_among_drafts(drafter, images, kind):
    model, pixels = drafter(kind).double(), images(8).double()
    free = both(model, pixels, eos_token_id=None)[1]
    words = free.sequences[(free.exit_layers > 0) & (free.exit_layers < LAYERS)].unique()[:4].tolist()
    full, drafted = both(model, pixels, eos_token_id=words)
    assert torch.equal(drafted.sequences, full.sequences)
    places = ((drafted.exit_layers > 0).int() * torch.arange(drafted.exit_layers.shape[1])).amax(1)
    assert (drafted.exit_layers.gather(1, places[:, None]) < LAYERS).any(), "an end must be a draft"
    assert len(places.unique()) > 1
    for row in range(8):
        alone = both(model, pixels[row : row + 1], eos_token_id=words)[1]
        length = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], drafted.sequences[row, :length])
        assert torch.equal(alone.exit_layers[0], drafted.exit_layers[row, :length])
        assert not drafted.exit_layers[row, length:].any()
    for limit in range(1, 9):
        output = both(model, pixels[:3], eos_token_id=None, max_new_tokens=limit, max_drafts=5)[1]
        assert torch.equal(output.sequences, free.sequences[:3, : limit + 1])
        assert output.draft_counts.tokens == 3 * limit
        assert (output.exit_layers[:, -1] == LAYERS).all()


def test_caches_that_cannot_be_cropped_are_refused(drafter, images):
    for cache in ("static", "offloaded"):
        with pytest.raises(UsageError, match="rows leave at different layers"):
            drafter().generate(images(1), lossless=True, max_new_tokens=4, cache_implementation=cache)

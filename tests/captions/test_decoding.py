"""Tokens leave early, rows do not see each other, and the cache misses nothing."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from hf_earlyexit.families import decoders, plain_gpt2
from hf_earlyexit.families.decoders import cache_name
from hf_earlyexit.generation import decoding
from hf_earlyexit.policies.decay import decayed
from tests.captions.conftest import LAYERS, WORDS

KINDS = ["gpt2", "bert"]
RULES = ["confidence", "entropy", "margin", "patience", "beem-c", "gate", "saturation", "static"]
MODES = {"greedy": {}, "beams": {"num_beams": 3}}
NEW = 15


def generated(model, images, **options):
    return model.generate(images, max_new_tokens=NEW, return_exit_layers=True, **options)


def cache_of(output):
    return output[cache_name(type(output))]


def spread(layers):
    """How many different layers the rows of one step left after, at most."""
    return max(len(set(column.tolist()) - {0}) for column in layers.T)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_rows_are_eight_batches_of_one(captioner, images, mixed, kind, attention, mode):
    model = captioner(kind, attention=attention)
    model.set_exit_policy(mixed(model, "confidence"))
    together = generated(model, images(8), **MODES[mode])
    assert spread(together.exit_layers) > 2, "rows must part within a step"
    for row in range(8):
        alone = generated(model, images(8)[row : row + 1], **MODES[mode])
        length = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, :length])
        assert torch.equal(alone.exit_layers[0], together.exit_layers[row, :length])
        assert not together.exit_layers[row, length:].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_sdpa_write_the_same(captioner, images, mixed, kind, mode):
    found = []
    for attention in ("eager", "sdpa"):
        model = captioner(kind, attention=attention)
        model.set_exit_policy(mixed(model, "confidence"))
        found.append(generated(model, images(6), **MODES[mode]))
    eager, sdpa = found
    assert spread(eager.exit_layers) > 1
    assert torch.equal(eager.sequences, sdpa.sequences)
    assert torch.equal(eager.exit_layers, sdpa.exit_layers)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_decodes_row_by_row(captioner, images, mixed, kind, rule):
    model = captioner(kind, exit_gate="linear", exit_head="linear")
    model.set_exit_policy(mixed(model, rule))
    together = generated(model, images(5))
    left = set(together.exit_layers.flatten().tolist()) - {0, LAYERS}
    assert left == {2} if rule == "static" else left, f"{rule} lets nobody go"
    for row in range(5):
        alone = generated(model, images(5)[row : row + 1])
        length = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, :length])
        assert torch.equal(alone.exit_layers[0], together.exit_layers[row, :length])


def test_rows_that_ended_run_no_more(captioner, images, mixed):
    """What a stock batch spends on padding; nothing that is written depends on it."""
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    end = int(generated(model, images(8), eos_token_id=None).sequences[0, 6])
    ran = []
    model.backbone.layers(model.decoder)[0].register_forward_hook(lambda _, inputs, __: ran.append(len(inputs[0])))
    output = generated(model, images(8), eos_token_id=end)
    written = (output.exit_layers > 0).sum(1)
    assert written.min() < written.max(), "captions must end at different places here"
    assert sum(ran) == int(written.sum())
    assert all(not layers[count + 1 :].any() for layers, count in zip(output.exit_layers, written.tolist(), strict=True))


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_layers_that_are_reported(captioner, images, mixed, kind, mode):
    model = captioner(kind)
    model.set_exit_policy(mixed(model, "confidence"))
    ran = [0] * LAYERS
    layers = model.backbone.layers(model.decoder)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, inputs, __, index=index: ran.__setitem__(index, ran[index] + len(inputs[0])))
    run = decoding.ExitRun(model.exit_policy)
    torch.manual_seed(0)
    GenerationMixin.generate(model, images(4), max_new_tokens=NEW, token_exits=run, **mode)
    left = torch.cat(run.exit_layers)
    assert ran == [int((left >= layer).sum()) for layer in range(1, LAYERS + 1)]
    assert ran[-1] < ran[0]


def entries_read_where_they_lie(captioner, images, mixed, monkeypatch):
    """What eight rows write whose attention reads the cache in place, and what the layers themselves write."""
    model, ran = captioner("gpt2", attention="sdpa"), []
    model.set_exit_policy(mixed(model, "confidence"))
    step = decoders.run_plain
    monkeypatch.setattr(decoders, "run_plain", lambda *args: ran.append(len(args[1])) or step(*args))
    in_place = generated(model, images(8), eos_token_id=None)
    assert len(set(ran)) > 3, "rows must part here"
    ran.clear()
    for layer in model.backbone.layers(model.decoder):
        layer.register_forward_hook(lambda *_: None)  # watched layers run themselves
    by_layers = generated(model, images(8), eos_token_id=None)
    assert not ran
    return in_place, by_layers


def test_attention_in_place_is_that_of_the_layers(captioner, images, mixed, monkeypatch):
    in_place, by_layers = entries_read_where_they_lie(captioner, images, mixed, monkeypatch)
    assert torch.equal(in_place.sequences, by_layers.sequences)
    assert torch.equal(in_place.exit_layers, by_layers.exit_layers)
    for one, other in zip(cache_of(in_place).self_attention_cache.layers,
                          cache_of(by_layers).self_attention_cache.layers, strict=True):  # fmt: skip
        assert torch.allclose(one.keys, other.keys, atol=1e-5)
        assert torch.allclose(one.values, other.values, atol=1e-5)


def test_attention_to_another_rows_entries_is_noticed(captioner, images, mixed, monkeypatch):
    attend = plain_gpt2._attend

    def shifted(query, entries, rows, mask, scale):
        return attend(query, entries, tuple(range(len(query))), mask, scale)

    monkeypatch.setattr(plain_gpt2, "_attend", shifted)
    in_place, by_layers = entries_read_where_they_lie(captioner, images, mixed, monkeypatch)
    assert not torch.equal(in_place.sequences, by_layers.sequences)


def reference_entries(model, image, ids, exits):
    """Keys and values `[layers][1, heads, T, d]` of one caption, each layer asked by itself over nothing but plain caches.

    A layer above a token's exit is given the state the token left with, and what it writes is kept, its output is not.
    """
    backbone, layers = model.backbone, model.backbone.layers(model.decoder)
    encoder = model.encoder(image).last_hidden_state
    encoder = model.enc_to_dec_proj(encoder) if hasattr(model, "enc_to_dec_proj") else encoder
    entries = [None] * LAYERS
    for position, (token, exit_layer) in enumerate(zip(ids, exits, strict=True)):
        state = backbone.embed(model.decoder, torch.tensor([[token]]), torch.tensor([[position]]), {})
        for index, layer in enumerate(layers):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for before in range(index):  # so that the cache has this many layers
                cache.self_attention_cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), before)
                cache.cross_attention_cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), before)
            if entries[index] is not None:
                cache.self_attention_cache.update(*entries[index], index)
            if backbone is decoders.crossing_backbone("gpt2"):
                after = layer(
                    state, encoder_hidden_states=encoder, use_cache=True, **{cache_name(type(layer).forward): cache}
                )
            else:
                after = layer(state, None, encoder, **{cache_name(type(layer).forward): cache})
            written = cache.self_attention_cache.layers[index]
            entries[index] = (written.keys, written.values)
            state = after if index < exit_layer else state
    return entries


def caches_of(model, images):
    output = model.generate(images, max_new_tokens=NEW, return_exit_layers=True, eos_token_id=None)
    return output, cache_of(output)


@pytest.mark.parametrize("rule", ["confidence", "saturation"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_that_of_a_slow_reference(captioner, images, mixed, kind, rule):
    model, batch = captioner(kind), images(3)
    model.set_exit_policy(mixed(model, rule))
    output, cache = caches_of(model, batch)
    assert spread(output.exit_layers) > 1
    lengths = {layer.keys.shape[2] for layer in cache.self_attention_cache.layers}
    assert lengths == {NEW}, "every layer has an entry for every token but the last"
    for row in range(3):
        with torch.no_grad():
            expected = reference_entries(
                model, batch[row : row + 1], output.sequences[row, :-1].tolist(), output.exit_layers[row, 1:].tolist()
            )
        for layer, (keys, values) in zip(cache.self_attention_cache.layers, expected, strict=True):
            torch.testing.assert_close(layer.keys[row : row + 1], keys, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(layer.values[row : row + 1], values, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_with_holes_is_noticed(captioner, images, mixed, monkeypatch, attention):
    """The mutant: layers above an exit get zeros in place of keys and values. Nothing raises, so the reference must tell."""
    model, batch = captioner(attention=attention), images(1)
    model.set_exit_policy(mixed(model, "confidence"))
    right = caches_of(model, batch)[0]
    real = decoding.token_cache
    monkeypatch.setattr(
        decoding,
        "token_cache",
        lambda cache, project: real(cache, lambda *given: (*map(torch.zeros_like, project(*given)),)),
    )
    output, cache = caches_of(model, batch)
    with torch.no_grad():
        expected = reference_entries(model, batch, output.sequences[0, :-1].tolist(), output.exit_layers[0, 1:].tolist())
    keys = cache.self_attention_cache.layers[-1].keys
    assert not torch.allclose(keys, expected[-1][0], atol=1e-3)
    assert not torch.equal(output.sequences, right.sequences)


def test_a_rule_over_the_whole_batch_is_noticed(captioner, images, mixed, monkeypatch):
    """The mutant: rows leave when all of them are sure."""
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    alone = [generated(model, images(6)[row : row + 1]).exit_layers[0].tolist() for row in range(6)]
    plain = ee.ConfidencePolicy.leaves
    monkeypatch.setattr(
        ee.ConfidencePolicy, "leaves", lambda self, score, index: plain(self, score, index).all().expand(len(score))
    )
    together = generated(model, images(6)).exit_layers
    assert any(together[row, : len(layers)].tolist() != layers for row, layers in enumerate(alone))


def test_the_prompt_runs_in_full_and_so_does_the_first_token(captioner, images, mixed):
    model = captioner()
    model.set_exit_policy(mixed(model, "static"))
    prompt = torch.tensor([[1, 7, 8]] * 2)
    layers = generated(model, images(2), decoder_input_ids=prompt).exit_layers
    assert layers[:, :4].tolist() == [[0, 0, 0, LAYERS]] * 2
    assert set(layers[:, 4:].flatten().tolist()) <= {0, 2}


def test_padded_prompts_of_other_lengths_do_not_matter(captioner, images, mixed):
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    prompts, mask = torch.tensor([[1, 7, 8], [0, 1, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    whole = generated(model, images(2), decoder_input_ids=prompts, decoder_attention_mask=mask)
    alone = generated(model, images(2)[:1], decoder_input_ids=prompts[:1], decoder_attention_mask=mask[:1])
    length = alone.sequences.shape[1]
    assert torch.equal(whole.sequences[0, :length], alone.sequences[0])
    assert torch.equal(whole.exit_layers[0, :length], alone.exit_layers[0])


@pytest.mark.parametrize("limit", [1, 2, 6])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_max_new_tokens_always_ends(captioner, images, mixed, limit, mode):
    model = captioner()
    model.set_exit_policy(mixed(model, "saturation"))
    output = model.generate(images(2), max_new_tokens=limit, return_exit_layers=True, eos_token_id=None, **mode)
    assert output.sequences.shape == output.exit_layers.shape == (2, 1 + limit)
    assert bool((output.exit_layers[:, 1:] > 0).all())


@pytest.mark.parametrize("returned", [1, 3])
def test_beams_report_the_layers_of_the_beam_that_won(captioner, images, mixed, returned):
    """Each token of the answer left where the pass that made it says, whatever beam it lay in then."""
    model, batch = captioner(), images(2)
    model.set_exit_policy(mixed(model, "confidence"))
    output = generated(model, batch, num_beams=3, num_return_sequences=returned)
    model.eval()
    for row, (ids, layers) in enumerate(zip(output.sequences, output.exit_layers, strict=True)):
        length = int((layers > 0).sum())
        with torch.no_grad():
            expected = replayed_layers(model, batch[row // returned][None], ids[: length + 1].tolist())
        assert layers[1 : length + 1].tolist() == expected


def replayed_layers(model, image, ids):
    """The layers that a caption's tokens leave after, decoded alone and forced token by token."""
    run = decoding.ExitRun(model.exit_policy)
    encoded = model.encoder(image)
    cache = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache(config=model.config.decoder))
    for token in ids[:-1]:
        model(
            decoder_input_ids=torch.tensor([[token]]),
            encoder_outputs=encoded,
            cache=cache,
            use_cache=True,
            token_exits=run,
        )
    return torch.cat(run.exit_layers).tolist()


@pytest.mark.parametrize("head", ["tied", "tuned", "linear", "low-rank"])
def test_a_shortlist_of_every_word_decides_as_the_vocabulary_does(captioner, images, mixed, head):
    fields = {"exit_head": head, "exit_rank": 8}
    whole, short = captioner(**fields), captioner(exit_signal="shortlist", exit_shortlist=WORDS, **fields)
    for model in (whole, short):
        model.set_exit_policy(mixed(whole, "confidence"))
    first, second = generated(whole, images(4)), generated(short, images(4))
    assert spread(first.exit_layers) > 1
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.exit_layers, second.exit_layers)


def test_a_shortlist_asks_the_full_head_once_per_token(captioner, images, mixed):
    model = captioner(exit_signal="shortlist", exit_shortlist=10)
    model.set_exit_shortlist(torch.randint(3, WORDS, (400,), generator=torch.Generator().manual_seed(0)), 10)
    model.set_exit_policy(mixed(model, "margin"))
    asked = []
    model.decoder.lm_head.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    output = generated(model, images(3), eos_token_id=None)
    assert set(output.exit_layers[:, 2:].flatten().tolist()) - {LAYERS}
    assert sum(asked) == 3 * NEW


@pytest.mark.parametrize("rule", ["saturation", "gate", "static"])
def test_rules_without_answers_ask_the_full_head_once_per_token(captioner, images, mixed, rule):
    model = captioner(exit_gate="linear")
    model.set_exit_policy(mixed(model, rule))
    asked = []
    model.decoder.lm_head.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    generated(model, images(3), eos_token_id=None)
    assert sum(asked) == 3 * NEW


def test_decaying_thresholds_let_later_tokens_go_sooner(captioner, images, mixed):
    model = captioner(exit_decay=0.3)
    policy = mixed(model, "confidence")
    first, late = decayed(policy, 0.5, 0), decayed(policy, 0.5, 50)
    assert first.thresholds == pytest.approx([0.9 * t + 0.1 for t in policy.thresholds])
    assert late.thresholds == pytest.approx([0.9 * t for t in policy.thresholds])
    counting = mixed(model, "patience")
    assert decayed(counting, 0.5, 3) == counting
    unbounded = ee.BeemPolicy(thresholds=[3.0], weights=[1.0, 1.0], vote="log-odds")
    assert decayed(unbounded, 0.0, 9).thresholds == pytest.approx([3.0])
    model.set_exit_policy(policy)
    served = generated(model, images(4), eos_token_id=None)
    steady = captioner()
    steady.set_exit_policy(policy)
    assert not torch.equal(served.exit_layers, generated(steady, images(4), eos_token_id=None).exit_layers)
    steady.set_exit_policy(decayed(policy, 0.3, 0))  # raised as at the first token, and never lowered
    assert not torch.equal(served.exit_layers, generated(steady, images(4), eos_token_id=None).exit_layers)


def test_a_static_cache_is_refused_with_the_reason(captioner, images, mixed):
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    with pytest.raises(UsageError, match="rows leave at different layers"):
        model.generate(images(2), max_new_tokens=5, cache_implementation="static")
    assert len(model.generate(images(2), max_new_tokens=5, cache_implementation="static", early_exit=False)) == 2


def test_state_lives_in_arguments(captioner, images, mixed):
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    before = set(vars(model)), {name: set(vars(part)) for name, part in model.named_modules()}
    first = generated(model, images(3))
    assert (set(vars(model)), {name: set(vars(part)) for name, part in model.named_modules()}) == before
    assert torch.equal(generated(model, images(3)).exit_layers, first.exit_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_without_loss_are_the_full_models(captioner, images, mixed, kind):
    model = captioner(kind)
    with torch.no_grad():  # upper layers that change little, so that some drafts are right
        for layer in model.backbone.layers(model.decoder)[1:]:
            for name, weight in layer.named_parameters():
                if name.endswith(("c_proj.weight", "output.dense.weight")):
                    weight *= 0.2 if kind == "gpt2" else 0.03
    model.set_exit_policy(mixed(model, "confidence", share=0.6))
    model, pixels = model.double(), images(5).double()
    full = model.generate(pixels, max_new_tokens=NEW, early_exit=False, return_dict_in_generate=True)
    drafted = model.generate(pixels, max_new_tokens=NEW, lossless=True, return_exit_layers=True)
    assert torch.equal(drafted.sequences, full.sequences)
    assert 0 < sum(drafted.draft_counts.accepted) < sum(drafted.draft_counts.drafted)
    mine, stock = (cache_of(output).self_attention_cache.layers for output in (drafted, full))
    for row, end in enumerate((drafted.exit_layers > 0).int().flip(1).argmax(1).tolist()):
        length = stock[0].keys.shape[2] - end
        for one, two in zip(mine, stock, strict=True):
            assert torch.allclose(one.keys[row, :, :length], two.keys[row, :, :length], atol=1e-10)
            assert torch.allclose(one.values[row, :, :length], two.values[row, :, :length], atol=1e-10)
    alone = model.generate(pixels[2:3], max_new_tokens=NEW, lossless=True)
    assert torch.equal(alone[0], drafted.sequences[2, : alone.shape[1]])
    with pytest.raises(UsageError, match="num_beams"):
        model.generate(pixels, num_beams=2, lossless=True)

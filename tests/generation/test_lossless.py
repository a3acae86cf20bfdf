"""Lossless early exit: the full model's own text, nothing computed twice, nothing of a rejected draft left."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LogitsProcessorList, PreTrainedTokenizerFast, StaticCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from hf_earlyexit.families.decoders import cache_name
from hf_earlyexit.generation.draft_cache import draft_cache
from hf_earlyexit.generation.drafts import Row, Speaker
from hf_earlyexit.generation.lossless import LosslessWalker
from hf_earlyexit.generation.token_cache import self_attention_of
from hf_earlyexit.modeling.outputs import EarlyExitCausalLMOutput
from tests.generation.conftest import LAYERS, PAD, WORDS, WRITERS, prompts

NEW = 14
EXACT = torch.float64  # rounding is far below any gap between two tokens' logits here
every = pytest.mark.parametrize("name", WRITERS)


def both(model, ids, mask, **options):
    """What the full model writes, and what it writes without loss."""
    options = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": PAD, **options}
    full = model.generate(ids, early_exit=False, return_dict_in_generate=True, **options)
    return full, model.generate(ids, lossless=True, return_exit_layers=True, **options)


def cache_of(output):
    return self_attention_of(output[cache_name(type(output))])


@pytest.fixture
def drafter(writer):
    """`drafter(name, **fields)`: a model of which about half of the drafts are right: the upper layers change little."""

    def make(name="llama", share=0.7, dtype=EXACT, **fields):
        model = writer(name, dtype=dtype, **fields)
        with torch.no_grad():
            for layer in model.backbone.layers(model)[1:]:
                for parameter, weight in layer.named_parameters():
                    if weight.ndim > 1 and any(part in parameter for part in ("o_proj", "down_proj", "c_proj")):
                        weight *= 0.15
        logits = model(prompts(20, 12, seed=3)[0], early_exit=False).exit_logits
        sure = logits.softmax(-1).amax(-1).flatten(0, 1)[:, :-1]
        model.set_exit_policy(ee.ConfidencePolicy(thresholds=sure.quantile(1 - share, dim=0).tolist()))
        return model

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every
def test_ids_and_cache_are_the_full_models(drafter, name, attention):
    """The keys and values of every layer, too: entries of rejected drafts are gone, those of accepted ones exact."""
    dtype = EXACT if attention == "sdpa" else torch.float32  # eager attention has no float64 for padded rows
    model = drafter(name, attn_implementation=attention, dtype=dtype)
    ids, mask = prompts(5, 6, padding=(4, 2))
    full, drafted = both(model, ids, mask)
    counts = drafted.draft_counts
    assert torch.equal(drafted.sequences, full.sequences)
    assert 0 < sum(counts.accepted) < sum(counts.drafted), "some drafts must be right and some wrong"
    close = 1e-10 if dtype == EXACT else 1e-5
    ends = (drafted.exit_layers > 0).int().flip(1).argmax(1)  # padding at the end
    for mine, stock in zip(cache_of(drafted).layers, cache_of(full).layers, strict=True):
        assert mine.get_seq_length() == stock.get_seq_length()
        for row, end in enumerate(ends.tolist()):
            for name_of_part in ("keys", "values"):
                kept, expected = (getattr(layer, name_of_part)[row] for layer in (mine, stock))
                length = expected.shape[1] - end
                assert torch.allclose(kept[:, :length][mask_of(mask[row], mine, length)],
                                      expected[:, :length][mask_of(mask[row], mine, length)], atol=close)  # fmt: skip
                assert not kept[:, length:].any()


@every
def test_the_cache_is_the_full_models_after_every_acceptance(drafter, name, monkeypatch):
    """Not only in the end: whenever drafts are accepted, entries up to there are those of plain decoding, in every layer."""
    model = drafter(name)
    ids, mask = prompts(3, 5, padding=(2,))
    full = both(model, ids, mask, eos_token_id=None)[0]
    text, layers = full.sequences, cache_of(full).layers
    dropped = [max(0, 5 - layer.sliding_window + 1) if layer.is_sliding else 0 for layer in layers]  # prompt's columns
    whole = torch.nn.functional.pad(mask, (0, NEW), value=1)
    cache = DynamicCache()  # drops nothing, also of layers with a window
    with torch.no_grad():
        model(text, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0), cache=cache, early_exit=False)
    checked, check = [], LosslessWalker._check

    def checks(self, rows):
        check(self, rows)
        for row in rows:
            end = row.length - 1
            checked.append(end)
            for mine, theirs, first in zip(self.cache.entries, cache.layers, dropped, strict=True):
                real = whole[row.number, first:end].bool()
                for entries, expected in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    apart = entries[row.number, :, first:end] - expected[row.number, :, first:end]
                    assert apart[:, real].abs().max() < 1e-10

    monkeypatch.setattr(LosslessWalker, "_check", checks)
    both(model, ids, mask, eos_token_id=None)
    assert len(checked) > 6
    assert len(set(checked)) > 3


def test_what_stands_behind_the_end_of_a_row_is_not_handed_back(drafter):
    """A row that ended inside its drafts leaves their entries behind; the cache that others go on with has zeros there."""
    model, ids = drafter("llama"), prompts(2, 3)[0]
    with torch.no_grad():
        cache = model(ids, use_cache=True, early_exit=False)[cache_name(EarlyExitCausalLMOutput)]
    entries = draft_cache(cache)
    new = torch.ones(2, *entries.entries[0].keys.shape[1:2], 4, entries.entries[0].keys.shape[3], dtype=EXACT)
    entries.look([0, 1], torch.arange(3, 7).expand(2, -1), 3, 7)
    for layer in range(LAYERS):
        entries.update(new, new, layer)
    entries.write_back(cache.layers, [4, 7])
    for layer in cache.layers:
        assert layer.keys.shape[2] == 7
        for part in (layer.keys, layer.values):
            assert bool((part[1, :, 3:] == 1).all())
            assert bool((part[0, :, 3] == 1).all())
            assert not part[0, :, 4:].any()


def mask_of(mask, layer, length):
    """Columns `[heads, length]` whose entries are read: padding's are not, and differ between forms of attention."""
    heads = layer.keys.shape[1]
    dropped = layer.get_seq_length() - layer.keys.shape[2]
    real = torch.cat([mask.bool(), torch.ones(length + dropped, dtype=torch.bool)])[dropped : dropped + length]
    return real.expand(heads, -1)


@every
def test_nothing_is_computed_twice(drafter, name):
    """Every token that is embedded runs each layer once: drafts in the lower layers, with all that wait in the upper."""
    model, ran = drafter(name), [0] * LAYERS
    calls, ids = [0] * LAYERS, prompts(1, 5)[0]
    for index, layer in enumerate(model.backbone.layers(model)):

        def count(_, args, __, index=index):
            calls[index] += 1
            ran[index] += args[0].shape[0] * args[0].shape[1]

        layer.register_forward_hook(count)
    output = model.generate(ids, lossless=True, return_exit_layers=True, max_new_tokens=NEW, eos_token_id=None)
    counts = output.draft_counts
    assert [count - 5 for count in ran] == counts.layer_tokens, "the prompt runs once"
    assert sum(calls) - LAYERS == counts.layer_calls
    steps, rejected = NEW - 1, sum(counts.drafted) - sum(counts.accepted)
    assert len(set(counts.layer_tokens)) == 1
    assert counts.layer_tokens[0] == counts.checks + sum(counts.drafted)
    assert counts.checks + sum(counts.accepted) == steps, "a check writes its drafts and one token more"
    assert calls[-1] - 1 == counts.checks < steps < calls[0] - 1 <= steps + rejected
    assert sum(counts.accepted) == int(((output.exit_layers > 0) & (output.exit_layers < LAYERS)).sum())


@pytest.mark.parametrize("most", [1, 2, 7])
def test_any_number_of_drafts_may_wait(drafter, most):
    model = drafter("qwen3")
    ids, mask = prompts(3, 1)  # prompts of one token
    full, drafted = both(model, ids, mask, max_drafts=most, eos_token_id=None)
    assert torch.equal(drafted.sequences, full.sequences)
    counts = drafted.draft_counts
    assert sum(counts.drafted) <= most * counts.checks
    with pytest.raises(UsageError, match="max_drafts"):
        both(model, ids, mask, max_drafts=0)


@pytest.mark.parametrize("rule", ["entropy", "margin", "patience", "beem-c", "gate", "saturation", "static"])
def test_every_rule_drafts(writer, rule):
    model = writer("llama", dtype=EXACT, exit_gate="linear", exit_head="linear")
    cls = ee.policies.POLICIES.get(rule)
    if rule == "static":
        policy = cls.at(1, LAYERS)
    else:
        level = {"patience": 1, "entropy": 0.05, "margin": 0.05, "saturation": 0.5, "gate": 0.5, "beem-c": 0.2}[rule]
        policy = cls(thresholds=(level,) * (LAYERS - 1), **({"weights": (1.0,) * LAYERS} if rule == "beem-c" else {}))
    model.set_exit_policy(policy)
    full, drafted = both(model, *prompts(3, 4))
    assert torch.equal(drafted.sequences, full.sequences)
    assert sum(drafted.draft_counts.drafted) > 0


def test_drafts_from_a_shortlist(drafter):
    model = drafter("gpt2", exit_head="tied")
    ids, mask = prompts(3, 4)
    plain = both(model, ids, mask)[1].draft_counts
    model.set_exit_shortlist(torch.arange(0, WORDS, 2), 45)
    for signal in ("shortlist", "vocabulary"):
        model.config.exit_signal = signal
        full, drafted = both(model, ids, mask)
        assert torch.equal(drafted.sequences, full.sequences)
    model.set_exit_policy(ee.policies.SaturationPolicy(thresholds=(0.0,) * 3))
    full, drafted = both(model, ids, mask)
    written = drafted.sequences[(drafted.exit_layers > 0) & (drafted.exit_layers < LAYERS)]
    assert torch.equal(drafted.sequences, full.sequences)
    assert len(written)
    assert not (written % 2).any(), "drafts are words of the list"
    assert plain.drafted != drafted.draft_counts.drafted


class Written(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], 0

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended += 1


PROCESSING = {
    "repetition": {"repetition_penalty": 3.0},
    "ngrams": {"no_repeat_ngram_size": 2},
    "least": {"min_new_tokens": 9, "eos_token_id": list(range(2, WORDS, 3))},
    "bias": {"sequence_bias": {(5,): 6.0, (7, 8): -4.0}},
    "by number": {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 17, 20 + row, int(ids[-1]) // 2]},
    "own": {
        "logits_processor": LogitsProcessorList([lambda ids, scores: scores.scatter_add(1, ids[:, -2:], scores[:, 9:11])])
    },
}


@pytest.mark.parametrize("kind", PROCESSING)
def test_processors_see_the_text_so_far(drafter, kind):
    model = drafter("llama")
    ids, mask = prompts(4, 5, padding=(2,))
    full, drafted = both(model, ids, mask, **PROCESSING[kind])
    assert torch.equal(drafted.sequences, full.sequences)
    assert sum(drafted.draft_counts.drafted) > 0
    plain = both(model, ids, mask)[0]
    assert not torch.equal(plain.sequences, full.sequences), "the processor must change something here"


def test_scores_and_logits_are_the_full_models(drafter):
    model = drafter("llama")
    options = {"output_scores": True, "output_logits": True, "repetition_penalty": 1.5}
    full, drafted = both(model, *prompts(2, 5), eos_token_id=None, **options)
    for name in ("scores", "logits"):
        mine, stock = (torch.stack(output[name]) for output in (drafted, full))
        assert mine.shape == stock.shape
        assert torch.allclose(mine, stock, atol=1e-5)
    assert drafted.logits[0].dtype == full.logits[0].dtype


def test_texts_end_inside_drafts(drafter):
    """At an end token, at a length, and where a caller's criterion says so; what was drafted beyond is gone."""
    model = drafter("llama")
    ids, mask = prompts(1, 5)
    free = both(model, ids, mask, eos_token_id=None)[1]
    inside = [place for place in range(6, len(free.sequences[0]) - 1) if free.exit_layers[0, place] < LAYERS]
    assert inside
    for place in inside[:2]:
        end = int(free.sequences[0, place])
        for options in (
            {"eos_token_id": [end, WORDS - 1]},
            {"eos_token_id": None, "max_new_tokens": place - 4},
            {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([_at(place + 1)])},
        ):
            full, drafted = both(model, ids, mask, **options)
            assert torch.equal(drafted.sequences, full.sequences)
            assert cache_of(drafted).get_seq_length() == full.sequences.shape[1] - 1
    first = int(free.sequences[0, 5])
    assert both(model, ids, mask, eos_token_id=first)[1].sequences.shape == (1, 6), "the first token may be the last"


def test_a_stopping_string_ends_a_text_inside_drafts(drafter):
    model = drafter("llama")
    letters = Tokenizer(models.BPE(vocab={chr(33 + number): number for number in range(WORDS)}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    ids, mask = prompts(1, 5)
    free = both(model, ids, mask, eos_token_id=None)[1]
    place = next(place for place in range(7, len(free.sequences[0]) - 1) if free.exit_layers[0, place] < LAYERS)
    word = tokenizer.decode(free.sequences[0, place - 1 : place + 1])
    assert len(word) == 2
    full, drafted = both(model, ids, mask, eos_token_id=None, stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(drafted.sequences, full.sequences)
    assert full.sequences.shape[1] < free.sequences.shape[1]
    assert drafted.draft_counts.tokens == full.sequences.shape[1] - 5


def _at(length):
    return lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= length)


def test_rows_that_have_ended_write_on_where_nothing_pads_them(drafter):
    model = drafter("llama")

    def criterion(ids, scores, **_):
        return ids[:, -1] % (4 + torch.arange(len(ids))) == 0

    options = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([criterion]), "max_new_tokens": 25}
    full, drafted = both(model, *prompts(4, 5), **options)
    assert torch.equal(drafted.sequences, full.sequences)


def test_streamers_get_every_token_once(drafter):
    model = drafter("llama")
    ids, _ = prompts(1, 5)
    written = [Written(), Written()]
    for streamer, options in zip(written, ({"early_exit": False}, {"lossless": True}), strict=True):
        model.generate(ids, streamer=streamer, max_new_tokens=NEW, **options)
    assert written[0].ids == written[1].ids
    assert written[1].ended == 1


def test_a_chat_goes_on_without_loss(drafter):
    model = drafter("qwen2")
    ids, mask = prompts(1, 7)
    caches = [cache_of(output) for output in both(model, ids, mask, eos_token_id=None)]
    text = both(model, ids, mask, eos_token_id=None)[0].sequences
    longer = torch.cat([text, prompts(1, 3, seed=8)[0]], 1)
    options = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": PAD}
    expected = model.generate(longer, early_exit=False, **options)
    for cache in caches:
        assert torch.equal(model.generate(longer, cache=cache, lossless=True, **options), expected)


def test_entries_of_rejected_drafts_that_stay_are_noticed(drafter, monkeypatch):
    """A mutant: rows do not go back to where the first wrong draft stood."""
    model = drafter("llama")
    ids, mask = prompts(3, 5)
    assert torch.equal(*(output.sequences for output in both(model, ids, mask)))
    kept = Speaker.check

    def keeps_rejected(self, row, logits, exit_layers):
        waited = len(row.drafts)
        right = kept(self, row, logits, exit_layers)
        if right < waited:
            row.shift += waited - right  # their columns are not written over
            row.offset += waited - right
        return right

    monkeypatch.setattr(Speaker, "check", keeps_rejected)
    full, drafted = both(model, ids, mask)
    assert not torch.equal(full.sequences, drafted.sequences)


def test_the_rule_of_drawing_is_exact():
    """Drafts from one distribution, checked by another: the second comes out, even where the first lacks words."""
    wanted = torch.tensor([0.5, 0.2, 0.2, 0.1])
    offered = torch.tensor([0.05, 0.55, 0.4, 0.0])
    torch.manual_seed(0)
    speaker = Speaker(1, LogitsProcessorList(), StoppingCriteriaList(), samples=True)
    draws = torch.zeros(4)
    for _ in range(6000):
        row = Row(0, torch.zeros(4, dtype=torch.long), 1, 0, 0)
        speaker.draft([row], 0, offered.log()[None], None, 4)
        draft = row.drafts[0].token
        speaker.check(row, wanted.log()[None], (1, 2))
        draws[row.text[1]] += 1
        assert row.exit_layers == [1 if draft == row.text[1] else 2]
    expected = wanted * draws.sum()
    assert float(((draws - expected) ** 2 / expected).sum()) < 16.3  # 0.1 % of a chi-square with 3 degrees of freedom


def test_what_cannot_be_lossless_is_refused(drafter, writer):
    model = drafter("llama")
    ids, mask = prompts(2, 5)
    for options, words in (
        ({"num_beams": 2}, "num_beams"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
    ):
        with pytest.raises(UsageError, match=words):
            model.generate(ids, attention_mask=mask, lossless=True, max_new_tokens=3, pad_token_id=PAD, **options)
    static = StaticCache(config=model.config, max_cache_len=20)  # its entries cannot be cropped
    with pytest.raises(UsageError, match="cannot decode over this cache"):
        model.generate(ids, cache=static, lossless=True, max_new_tokens=3, pad_token_id=PAD)
    with pytest.raises(UsageError, match="no policy makes drafts"):
        writer("llama").generate(ids, lossless=True)
    with pytest.raises(UsageError, match="no policy makes drafts"):
        model.generate(ids, lossless=True, early_exit=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every
def test_ties_may_fall_otherwise_in_half_precision_and_are_counted(drafter, name, dtype):
    """A batch of another shape rounds otherwise: of 24 texts few differ, in float32 none, and only where two words are tied.

    By the scores that plain decoding itself compared: at most one rounding of the greatest apart.
    """
    model, differ, ids = drafter(name).to(dtype), 0, prompts(24, 5)[0]
    for rows in ids.split(8):
        full, drafted = both(model, rows, torch.ones_like(rows), eos_token_id=None, output_logits=True)
        assert sum(drafted.draft_counts.drafted) > 0
        for row, (one, two) in enumerate(zip(full.sequences, drafted.sequences, strict=True)):
            if torch.equal(one, two):
                continue
            differ += 1
            place = int((one != two).int().argmax())
            logits = full.logits[place - 5][row].float()
            apart = float(logits[one[place]] - logits[two[place]])
            assert 0 <= apart <= torch.finfo(dtype).eps * float(logits.abs().max()), f"no tie: {apart}"
    assert differ <= (0 if dtype == torch.float32 else 3)

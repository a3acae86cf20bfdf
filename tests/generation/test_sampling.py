"""Sampling without loss: with drafts and without, texts are drawn from one distribution."""

import torch
from scipy.stats import chi2

import hf_earlyexit as ee
from hf_earlyexit.generation.drafts import Speaker
from tests.generation.conftest import WRITERS, door

WORDS, ROWS, NEW = 6, 1250, 4  # 1,250 texts of four tokens from each of four models: 20,000 tokens, each way
DRAWING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
SHAPES = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}}
USUAL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
         "intermediate_size": 16}  # fmt: skip


def speaker(name):
    """A model of six words and two layers whose first exit thinks otherwise than the last, and drafts often."""
    torch.manual_seed(0)
    fields = {"vocab_size": WORDS, "initializer_range": 0.5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    cls = door(name)
    model = cls(cls.config_class(**SHAPES.get(name, USUAL), **fields, exit_layers=[1, 2])).eval()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.3,)))
    return model


def drawn(name):
    """Texts `[ROWS, NEW]` drawn by the full model and with drafts, and what drafts there were."""
    model, ids = speaker(name), torch.tensor([[3, 1]]).expand(ROWS, -1)
    torch.manual_seed(1)
    full = model.generate(ids, early_exit=False, **DRAWING)
    drafted = model.generate(ids, lossless=True, return_exit_layers=True, **DRAWING)
    return full[:, 2:], drafted.sequences[:, 2:], drafted.draft_counts


def compared(one, two):
    """Chi-square of two samples of texts and its degrees of freedom, by the two tokens that are drafted.

    The first comes from the prompt, the last is not worth a draft; kinds seen fewer than 20 times stand together.
    """
    base = torch.tensor([WORDS, 1])
    first, second = (torch.bincount(part[:, 1:3] @ base, minlength=WORDS**2).double() for part in (one, two))
    often = first + second >= 20
    first, second = (torch.cat([part[often], part[~often].sum()[None]]) for part in (first, second))
    return float(((first - second) ** 2 / (first + second).clamp_min(1)).sum()), len(first) - 1


def chance(samples):
    """How likely two samples of one distribution differ as much or more, all models together."""
    statistics, degrees = zip(*(compared(one, two) for one, two, _ in samples), strict=True)
    return chi2.sf(sum(statistics), sum(degrees))


def test_drafts_and_the_full_model_draw_from_one_distribution():
    samples = [drawn(name) for name in WRITERS]
    for one, two, counts in samples:
        assert one.shape == two.shape == (ROWS, NEW)
        drafted, right = sum(counts.drafted), sum(counts.accepted)
        assert drafted > ROWS
        assert 0.2 * drafted < right < 0.8 * drafted, "drafts must be kept and taken back in earnest"
    assert chance(samples) > 0.001


def test_a_rule_that_is_almost_right_is_noticed(monkeypatch):
    """A mutant: drafts are kept with chance min(1, (p / q) ** 0.8)."""
    draw = Speaker._token

    def almost(self, scores, draft):
        if draft is None:
            return draw(self, scores, draft)
        chances = scores.softmax(-1)
        odds = float(chances[draft.token] / draft.chances[draft.token]) ** 0.8
        if float(torch.rand(())) < odds:
            return draft.token
        rest = (chances - draft.chances).clamp_min(0)
        return int((rest if rest.any() else chances).multinomial(1))

    monkeypatch.setattr(Speaker, "_token", almost)
    assert chance([drawn(name) for name in WRITERS]) < 0.001

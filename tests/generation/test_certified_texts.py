"""Promises about texts: certified by whole texts of other prompts, in turn, and broken no more often than is allowed."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

import hf_earlyexit as ee
from hf_earlyexit.calibration import CalibrationResult, Certified
from hf_earlyexit.calibration.evidence import binomial_p
from hf_earlyexit.calibration.walk import Walk
from hf_earlyexit.errors import CalibrationError
from hf_earlyexit.generation import calibrate as module
from hf_earlyexit.generation.certify import TextsAlong, everybody
from hf_earlyexit.generation.metrics import rouge_l
from tests.generation.conftest import PAD, prompts

NEW = 6
ROWS = [row[: 3 + place % 4].tolist() for place, row in enumerate(prompts(160, 6)[0])]


def calibrated(model, target, rows=ROWS, policy="confidence", **options):
    usual = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD, "progress": False, "proposals": 8}
    return ee.generation.calibrate_generation(model, rows, policy, target, **{**usual, **options})


def texts_of(model, places, policy):
    """What `generate` writes after some prompts, those of one length at a time, as words of ids, and the layers."""
    model.set_exit_policy(policy)
    texts, layers = {}, {}
    for width in sorted({len(ROWS[place]) for place in places}):
        same = [place for place in places if len(ROWS[place]) == width]
        ids = torch.tensor([ROWS[place] for place in same])
        options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD, "return_exit_layers": True}
        output = model.generate(ids, **options, early_exit=policy is not None)
        for place, row, left in zip(same, output.sequences[:, width:], output.exit_layers[:, width:], strict=True):
            texts[place], layers[place] = " ".join(map(str, row.tolist())), left.tolist()
    return [texts[place] for place in places], [layers[place] for place in places]


@pytest.mark.parametrize("risk", ["drop", "harm", "disagreement"])
def test_a_promise_about_texts_is_what_their_prompts_write(writer, tmp_path, risk):
    model = writer("gpt2", exit_head="tied")
    limit = 0.95 if risk == "disagreement" else 0.7
    found = calibrated(model, Certified(limit, 0.9, risk=risk))
    promise = found.promise
    assert (promise.unit, promise.num_rows, promise.num_path_rows) == ("texts", 128, 32) == ("texts", found.num_rows, 32)
    assert promise.num_settings == len(found.settings)
    costs = [setting.mean_cost for setting in found.settings]
    assert costs == sorted(costs, reverse=True)
    assert found.chosen > 0
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    certifying = sorted(order[32:])
    full, _ = texts_of(model, certifying, None)
    early, layers = texts_of(model, certifying, found.policy)
    if risk == "disagreement":
        losses = [ours != theirs for ours, theirs in zip(early, full, strict=True)]
        assert promise.measure is None
        assert "differs from the full model's for at most 95 % of texts" in str(found)
    else:
        losses = 1 - np.array(rouge_l(early, [[text] for text in full]))
        assert promise.measure == "rouge_l against the full model"
    assert promise.mean_loss == pytest.approx(np.mean(losses))
    assert promise.p_value <= 0.1
    assert found.mean_layers == pytest.approx(np.mean(layers))
    assert any("the table is of the 32 texts" in note for note in found.notes)
    found.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == found
    model.set_exit_policy(found)
    assert model.config.exit_certificate["promise"]["unit"] == "texts"


def test_slices_of_prompts_each_keep_it(writer):
    """Of texts as of rows; the rarest slice is the one that is too small."""
    model, kinds = writer("gpt2", exit_head="tied"), ["short" if len(row) < 5 else "long" for row in ROWS]
    found = calibrated(model, Certified(0.8, 0.9, by="group"), groups=kinds)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    certifying = sorted(order[32:])
    full, early = (texts_of(model, certifying, policy)[0] for policy in (None, found.policy))
    losses = 1 - np.array(rouge_l(early, [[text] for text in full]))
    slices = np.array(kinds)[certifying]
    assert found.chosen > 0
    assert [group.name for group in found.promise.groups] == ["group long", "group short"]
    for group in found.promise.groups:
        here = losses[slices == group.name.removeprefix("group ")]
        assert (group.num_rows, group.mean_loss) == (len(here), pytest.approx(here.mean()))
        assert group.p_value <= 0.1
    together = calibrated(model, Certified(0.8, 0.9))
    assert together.chosen >= found.chosen
    rare = ["rare" if place == certifying[0] else "usual" for place in range(len(ROWS))]
    with pytest.raises(CalibrationError, match="1 certifying texts of group rare cannot certify"):
        calibrated(model, Certified(0.8, 0.9, by="group"), groups=rare)


def test_a_policy_learns_from_the_texts_that_make_the_path(writer):
    found = calibrated(writer("llama", exit_head="tied"), "certified:0.7@0.9", policy="beem-a", learning_share=0.3)
    assert (found.num_learning_rows, found.num_rows) == (48, 112)
    assert found.promise.num_path_rows == 48


def test_settings_write_only_when_it_is_their_turn(writer, monkeypatch):
    """None after the first that is not certified; none at all where there are too few texts."""
    model, written = writer("gpt2", exit_head="tied"), []
    real = module.write

    def spy(model, batch, policy, options):
        written.append(len(batch))
        return real(model, batch, policy, options)

    monkeypatch.setattr(module, "write", spy)
    found = calibrated(model, Certified(0.05, 0.9), batch_size=1000)
    assert found.chosen < len(found.settings) - 1
    assert written.count(32) == len(found.settings)
    assert written.count(128) == found.chosen + 2  # the full model, those that hold, and the first that does not
    written.clear()
    with pytest.raises(CalibrationError, match=r"128 certifying texts cannot certify 0.01 at 0.95: \d+ without a"):
        calibrated(model, Certified(0.01), batch_size=1000)
    assert 128 not in written


def test_copies_of_prompts_are_warned_of(writer):
    model = writer("gpt2", exit_head="tied")
    copied = calibrated(model, Certified(0.7, 0.9), [*ROWS[:60], *ROWS[:40]])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()[20:]
    twice = 80 - len({tuple(ROWS[place % 60]) for place in order})
    assert twice > 10
    assert any(f"{twice} of 80 prompts are copies of others" in note for note in copied.notes)
    distinct = [row for place, row in enumerate(ROWS) if row not in ROWS[:place]]
    assert not any("copies" in note for note in calibrated(model, Certified(0.7, 0.9), distinct).notes)


def length(texts, references):
    return [float(len(text)) for text in texts]


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (Certified(0.5), {"metric": length}, "bound is None; certifying texts by length needs the most"),
        (Certified(0.5, by="label"), {}, "texts are certified all together or by 'group'"),
        (Certified(0.5, by="group"), {}, "pass the slice of each row as groups"),
        (Certified(0.5), {"groups": ["a"] * len(ROWS)}, "go together"),
        (ee.MaxDrop(0.5), {"groups": ["a"] * len(ROWS)}, "would not see them"),
        (Certified(0.5, by="group"), {"groups": ["a", "b"]}, r"groups has shape \(2,\); expected one .* each of 160 rows"),
        (Certified(0.5, by="group"), {"groups": [0.5] * len(ROWS)}, "groups are float64"),
        (Certified(0.5), {"rows": ROWS[:2]}, "expected a share that leaves rows on both sides"),
    ],
)
def test_what_texts_cannot_do(writer, target, options, words):
    with pytest.raises(CalibrationError, match=words):
        calibrated(writer("gpt2"), target, **options)


def test_a_metric_of_ones_own_is_cut_to_its_bound(writer):
    found = calibrated(writer("gpt2", exit_head="tied"), Certified(0.6, 0.9, bound=2.0), metric=length)
    assert found.promise.bound == 2.0
    assert "(length against the full model) exceeds the early answers' by at most 1.2, differences cut to 2" in str(found)
    assert abs(found.promise.mean_loss) <= 1


SETTINGS, POOL = 13, 6000


def pool_of_texts(seed=0):
    """Scores of texts at settings ever cheaper; a text that has changed stays changed, and loses more or less."""
    draw = np.random.default_rng(seed)
    breaks, depth = draw.random(POOL) * 1.6, draw.beta(0.7, 1.3, POOL)
    places = np.linspace(0, 1, SETTINGS)
    gained = draw.random(POOL) < 0.2
    lost = np.where(gained, -0.3, 1.0) * depth
    return 0.5 + 0 * breaks[:, None] - np.where(breaks[:, None] < 0.5 * places, lost[:, None], 0.0) * 0.5


def walk_of(target, scores, rows, before):
    texts = np.where(scores == scores[:, :1], "same", "other")

    def scored(some):
        return lambda place: (scores[some, place], texts[some, place])

    path = TextsAlong(target, scored(before), SETTINGS, everybody(len(before)))
    along = TextsAlong(target, scored(rows), SETTINGS, everybody(len(rows)), path.losses)
    return Walk(target, along, path, along.parts, "texts")


def test_every_slice_is_judged_by_its_own_texts():
    early, long = np.array([0.0, 1.0, 1.0, 0.5, 1.0]), np.array([True, False, False, True, False])
    scored = [(np.ones(5), ["full"] * 5), (early, ["early"] * 5)]
    parts = {"group long": long, "group short": ~long}
    tallies = TextsAlong(Certified(0.5, 0.9, by="group"), scored.__getitem__, 2, parts).tallies(1)
    assert [(tally.total, tally.counts.sum()) for tally in tallies] == [(1.5, 2), (0.0, 3)]


@pytest.mark.parametrize("risk", ["drop", "harm", "disagreement"])
def test_the_promise_about_texts_holds(risk):
    scores, limit, delta, draws, count = pool_of_texts(), 0.05, 0.1, 400, 400
    target = Certified(limit, 1 - delta, risk=risk, bound=0.5)
    everyone = walk_of(target, scores, np.arange(500, POOL), np.arange(500))
    risks = np.array([everyone.along.at(place).mean() for place in range(SETTINGS)])
    assert risks[-1] > 1.2 * limit
    draw = np.random.default_rng(1)
    used = risks[
        [walk_of(target, scores, draw.integers(500, POOL, count), np.arange(500)).last_certified() for _ in range(draws)]
    ]
    assert (used > limit).sum() <= binom.ppf(0.999, draws, delta)
    assert used.mean() >= limit / 2


def test_words_are_not_what_certifies_texts():
    """The mutant: tokens taken for as many independent draws. A text that goes astray loses many of them together."""
    draw, limit, delta, draws, texts, words = np.random.default_rng(0), 0.05, 0.1, 400, 150, 20
    broken = {"texts": 0, "words": 0}
    for _ in range(draws):
        astray = draw.random(texts) < 0.06
        broken["texts"] += binomial_p(astray.sum(), texts, limit) <= delta
        broken["words"] += binomial_p(astray.sum() * words, texts * words, limit) <= delta
    assert broken["texts"] <= binom.ppf(0.999, draws, delta) < broken["words"]

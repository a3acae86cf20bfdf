"""The promise holds as often as it says, in draws from pools whose risk is known; each way to break it is caught here."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom

from hf_earlyexit.calibration import (
    CalibrationResult,
    Certified,
    MaxDrop,
    calibrate,
    cross_fit,
    parse_target,
    replay,
    risks,
    walk,
)
from hf_earlyexit.calibration import certify as module
from hf_earlyexit.calibration.certify import walk_of_rows
from hf_earlyexit.calibration.evidence import (
    betting_p,
    binomial_p,
    fallback,
    fixed_sequence,
    hoeffding_bentkus_p,
    holm,
    least_rows,
)
from hf_earlyexit.calibration.quality import find_metric
from hf_earlyexit.calibration.risks import COUNT, Losses, Plan, Tally
from hf_earlyexit.calibration.settings import Pool, Recipe, choose
from hf_earlyexit.calibration.walk import Walk
from hf_earlyexit.errors import CalibrationError, DataError
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from tests.samples import learned_trace, sst2_trace

DRAWS = 1000
STEPS = 50


class KnownPool:
    """20,000 rows of known risk: one exit, whose losses grow likelier as its score falls."""

    def __init__(self, risk="harm", rows=20_000, seed=0, most=0.12, steps=STEPS):
        generator = np.random.default_rng(seed)
        rows += 1000  # the last ones make plans
        self.scores = np.stack([generator.random(rows), np.zeros(rows)], 1)
        harmed = generator.random(rows) < 2 * most * (1 - self.scores[:, 0])
        helped = (generator.random(rows) < 0.005) & ~harmed if risk == "drop" else np.zeros(rows, dtype=bool)
        self.losses = np.stack([harmed.astype(float) - helped, np.zeros(rows)], 1)
        self.low = -1.0 if risk == "drop" else 0.0
        self.path = np.append(np.nan, np.linspace(1, 0, steps))[:, None]
        taken = (self.scores[:, :1] >= np.nan_to_num(self.path.T, nan=2.0)).astype(float)
        self.before = self.scores[-1000:], self.losses[-1000:]
        self.risks = (taken * self.losses[:, :1])[:-1000].mean(0)

    def walk(self, target, rows):
        losses = Losses(self.losses[rows], self.low, 1.0)
        parts = {"all rows": np.ones(len(rows), dtype=bool)}
        return module.walk_of_rows(target, losses, self.scores[rows], self.path, parts, self.before)

    def certified(self, target, count, draws=DRAWS):
        """True risk of what each draw certified."""
        generator = np.random.default_rng(1)
        chosen = [
            self.walk(target, generator.integers(0, len(self.scores) - 1000, count)).last_certified() for _ in range(draws)
        ]
        return self.risks[chosen]


def most_broken(delta, draws=DRAWS):
    """The most broken promises that chance allows, once in a thousand such tests."""
    return binom.ppf(0.999, draws, delta)


@pytest.mark.parametrize("procedure", ["fixed-sequence", "fallback"])
@pytest.mark.parametrize("risk", ["harm", "drop"])
@pytest.mark.parametrize(("limit", "delta"), [(0.05, 0.1), (0.02, 0.05)])
@pytest.mark.parametrize("count", [300, 1000])
def test_the_promise_holds_and_is_used(risk, limit, delta, count, procedure):
    target = Certified(limit, 1 - delta, risk=risk, procedure=procedure)
    pool = KnownPool(risk)
    draws = 300 if risk == "drop" else 500
    used = pool.certified(target, count, draws)
    assert (used > limit).sum() <= most_broken(delta, draws)
    if count == 1000:  # "never leave early" would keep every promise
        assert used.mean() >= limit / 2 if procedure == "fixed-sequence" or limit > 0.02 else used.mean() > 0.3 * limit


def off_by_one(monkeypatch):
    real = Walk.last_certified
    monkeypatch.setattr(Walk, "last_certified", lambda self: min(real(self) + 1, len(self.along) - 1))


def turned_round(monkeypatch):
    real = Losses.p_value
    monkeypatch.setattr(Losses, "p_value", lambda self, *given: 1 - real(self, *given))


def on_past_the_first_failure(monkeypatch):
    monkeypatch.setattr(
        walk, "fixed_sequence", lambda p_value, count, delta: [k for k in range(count) if p_value(k) <= delta]
    )


def naive(monkeypatch):
    monkeypatch.setattr(
        Losses, "p_value", lambda self, losses, limit, plan, levels: float(losses.total / losses.counts.sum() > limit)
    )


def path_by_certifying_rows(monkeypatch):
    """The settings in the order in which they look good on the very rows."""
    real = walk_of_rows

    def sorted_first(target, losses, scores, path, *others):
        along = real(target, losses, scores, path, *others).along
        looks = np.argsort([along.at(place).mean() for place in range(len(path))], kind="stable")
        return real(target, losses, scores, path[looks], *others)

    monkeypatch.setattr(module, "walk_of_rows", sorted_first)


@pytest.mark.parametrize("mutant", [off_by_one, naive])
def test_a_broken_procedure_breaks_the_promise(monkeypatch, mutant):
    pool, delta, draws = KnownPool(rows=4000, most=0.2, steps=25), 0.1, 250
    target = Certified(0.05, 1 - delta, risk="harm")
    assert (pool.certified(target, 3000, draws) > 0.05).sum() <= most_broken(delta, draws)
    mutant(monkeypatch)
    assert (pool.certified(target, 3000, draws) > 0.05).sum() > most_broken(delta, draws)


def test_a_test_turned_round_promises_nothing_worth_having(monkeypatch):
    pool, target = KnownPool(rows=4000), Certified(0.05, 0.9, risk="harm")
    assert pool.certified(target, 1000, 20).mean() >= 0.025
    turned_round(monkeypatch)
    assert pool.certified(target, 1000, 20).mean() < 0.025


@pytest.mark.parametrize("mutant", [on_past_the_first_failure, path_by_certifying_rows])
def test_looking_for_a_lucky_setting_breaks_the_promise(monkeypatch, mutant):
    """Many settings just above the limit: some of them look certified by luck."""
    generator, delta, draws = np.random.default_rng(3), 0.1, 200
    rows, steps = 3000, 40

    def broken():
        scores = np.tile(np.linspace(0, 1, rows)[:, None], (1, steps + 1))
        losses = (generator.random((rows, steps + 1)) < 0.053).astype(float)  # each exit too harmful, by itself
        path = np.full((steps + 1, steps), np.nan)
        path[np.arange(1, steps + 1), np.arange(steps)] = 0.0  # all rows leave at one exit
        losses[:, -1] = 0
        target, parts = Certified(0.05, 1 - delta, risk="harm"), {"all rows": np.ones(rows, dtype=bool)}
        return (
            module.walk_of_rows(target, Losses(losses, 0.0, 1.0), scores, path, parts, (scores, losses)).last_certified() > 0
        )

    assert sum(broken() for _ in range(draws)) <= most_broken(delta, draws)
    mutant(monkeypatch)
    assert sum(broken() for _ in range(draws)) > most_broken(delta, draws)


def test_a_difference_that_is_not_paired_breaks_the_promise():
    """Rows whose early answers fail exactly where the full model succeeds: errors of each alone say nothing of harm."""
    generator, delta, draws, count = np.random.default_rng(5), 0.1, 200, 1000
    full = generator.random(20_000) < 0.5
    early = np.where(generator.random(20_000) < 0.06, ~full, full)
    harm = (full & ~early).astype(float)
    assert harm.mean() > 0.025
    broken = {"paired": 0, "unpaired": 0}
    for _ in range(draws):
        rows = generator.integers(0, len(full), count)
        tally = Tally(np.array([0.0, 1.0]), np.bincount(harm[rows].astype(int), minlength=2).astype(float))
        broken["paired"] += Losses(harm[rows], 0.0, 1.0).p_value(tally, 0.025, Plan(COUNT)) <= delta
        excess = max(0.0, full[rows].mean() - early[rows].mean())  # what comparing two accuracies would call harm
        broken["unpaired"] += binomial_p(excess * count, count, 0.025) <= delta
    assert broken["paired"] <= most_broken(delta, draws) < broken["unpaired"]


def test_conformal_risk_control_holds_on_average_only():
    pool, target = KnownPool(), Certified(0.05, risk="harm", procedure="crc")
    used = pool.certified(target, 300, 400)
    assert used.mean() <= 0.05 + 3 * used.std() / math.sqrt(len(used))
    assert used.mean() >= 0.035
    assert (used > 0.05).mean() > 0.2  # which is why it is no promise of 95 %


# --- p-values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3])
def test_p_values_are_valid_and_agree(limit):
    """At a risk of just the limit a p-value is below delta in at most a share delta of draws."""
    generator = np.random.default_rng(0)
    sums = generator.binomial(500, limit, 4000)
    ways = {
        "binomial": [binomial_p(total, 500, limit) for total in sums],
        "betting": [betting_p(np.array([0.0, 1.0]), np.array([500.0 - total, total]), limit, 0.5) for total in sums],
    }
    for name, values in ways.items():
        for delta in (0.05, 0.2):
            assert (np.array(values) <= delta).sum() <= most_broken(delta, 4000), name
    assert np.mean(ways["binomial"]) <= np.mean(ways["betting"])


def test_the_binomial_tail_is_that_of_the_distribution():
    for rows, limit in ((1, 0.5), (299, 0.01), (3000, 0.02), (100_000, 0.05)):
        totals = np.unique(np.linspace(0, min(rows, 2 * rows * limit + 3), 40).round())
        assert [binomial_p(total, rows, limit) for total in totals] == pytest.approx(
            binom.cdf(totals, rows, limit), rel=1e-9
        )


@pytest.mark.parametrize(("rows", "limit"), [(1, 0.5), (100, 0.05), (1000, 0.01), (3000, 0.3)])
def test_hoeffding_bentkus_is_that_of_the_formula_and_of_mapie(rows, limit):
    totals = np.unique([0.0, *np.linspace(0, min(rows, 1.5 * rows * limit), 23), 1.0, rows])
    theirs = np.asarray(compute_hoeffding_bentkus_p_value(totals / rows, rows, np.array([limit]))).flatten()

    def by_hand(total):
        mean = min(total / rows, limit)
        other = (1 - mean) * math.log((1 - mean) / (1 - limit)) if mean < 1 else 0.0
        tight = math.exp(-rows * (other + (mean * math.log(mean / limit) if mean else 0.0)))
        return min(1.0, tight, math.e * binom.cdf(math.ceil(round(total, 9)), rows, limit))

    ours = [hoeffding_bentkus_p(total, rows, limit) for total in totals]
    assert ours == pytest.approx([by_hand(total) for total in totals], rel=1e-9)
    assert ours == pytest.approx(np.minimum(theirs, 1.0), rel=1e-6)


class BoundedPool(KnownPool):
    """Losses of nearly one, which the binomial test takes for whole ones."""

    def __init__(self, **options):
        super().__init__(**options)
        self.losses *= 0.95
        self.before, self.risks = (self.before[0], self.before[1] * 0.95), self.risks * 0.95


@pytest.mark.parametrize("count", [1000, 3000])
def test_bounded_losses_keep_the_promise(count):
    pool, target = BoundedPool(), Certified(0.05, 0.9, risk="harm")
    used = pool.certified(target, count, 300)
    assert (used > 0.05).sum() <= most_broken(0.1, 300)
    assert used.mean() >= 0.025
    plans = pool.walk(target, np.arange(count)).plans
    assert plans[0].test == "Hoeffding-Bentkus"


def too_few_losses(monkeypatch):
    real = risks.hoeffding_bentkus_p
    monkeypatch.setattr(risks, "hoeffding_bentkus_p", lambda total, *given: real(max(0.0, total - 0.3 * total), *given))


def test_a_sum_that_forgets_losses_breaks_the_promise(monkeypatch):
    pool, target = BoundedPool(rows=4000, most=0.2, steps=25), Certified(0.05, 0.9, risk="harm")
    assert pool.walk(target, np.arange(3000)).plans[0].test == "Hoeffding-Bentkus"
    assert (pool.certified(target, 3000, 200) > 0.05).sum() <= most_broken(0.1, 200)
    too_few_losses(monkeypatch)
    assert (pool.certified(target, 3000, 200) > 0.05).sum() > most_broken(0.1, 200)


def test_betting_uses_that_losses_hardly_vary():
    """Losses of 0.5 throughout, as a difference of none is on the scale of [-1, 1]: MAPIE's bound needs far more rows."""
    theirs = compute_hoeffding_bentkus_p_value(np.array([0.5]), 1000, np.array([0.505]))
    assert betting_p(np.array([0.5]), np.array([1000.0]), 0.505, 0.9) < 1e-3 < float(np.asarray(theirs).item())


def test_mapie_certifies_no_more():
    """Its Learn-then-Test p-values are valid for any loss in [0, 1]; ours for losses of 0 and 1 are exact, hence smaller."""
    totals = np.arange(0, 60, 3)
    theirs = np.asarray(compute_hoeffding_bentkus_p_value(totals / 1000, 1000, np.array([0.05]))).flatten()
    ours = np.array([binomial_p(total, 1000, 0.05) for total in totals])
    assert (ours <= theirs + 1e-12).all()
    assert theirs[ours <= 0.05][:-2].max() <= 0.05  # and hardly so: theirs certifies nearly all of what ours does


def test_procedures_by_hand():
    values = [0.0, 0.01, 0.2, 0.001, 0.0]
    assert fixed_sequence(values.__getitem__, 5, 0.05) == [0, 1]
    assert fallback(values.__getitem__, 5, 0.05, starts=1) == [0, 1]
    assert fallback(values.__getitem__, 5, 0.05, starts=5) == [0, 1, 3, 4]
    asked = []
    fixed_sequence(lambda place: asked.append(place) or values[place], 5, 0.05)
    assert asked == [0, 1, 2]
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert least_rows(lambda n: binomial_p(0, n, 0.01), 0.05) == 299


# --- through calibrate ------------------------------------------------------------------------------------------------


def test_the_table_of_least_rows():
    """Rows without a single loss that certify a limit: ln(delta) / ln(1 - limit)."""
    for limit, row in {0.005: (460, 598, 919), 0.01: (230, 299, 459), 0.02: (114, 149, 228), 0.05: (45, 59, 90)}.items():
        for delta, expected in zip((0.1, 0.05, 0.01), row, strict=True):
            assert least_rows(lambda n, limit=limit: binomial_p(0, n, limit), delta) == expected


def test_too_few_rows_are_refused_with_what_would_do():
    with pytest.raises(CalibrationError, match=r"160 certifying rows cannot certify 0.01 at 0.95: 299 without") as caught:
        calibrate(learned_trace(200), "confidence", Certified(0.01, risk="harm"))
    assert caught.value.value == 160


@pytest.mark.parametrize("policy", ["confidence", "beem-a", "patience", "gate"])
@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("risk", ["drop", "harm", "disagreement"])
def test_a_certified_setting_leaves_early_and_says_on_which_evidence(policy, per_exit, risk):
    trace = learned_trace(3000, seed=2)
    result = calibrate(trace, policy, Certified(0.05, 0.9, risk=risk), per_exit=per_exit)
    promise = result.promise
    assert (promise.num_rows, promise.num_path_rows) == (2400, 600) == (result.num_rows, result.num_learning_rows)
    assert promise.p_value <= 0.1
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    rows = trace.select(order[600:])
    scan = result.policy.scan(rows)
    taken = result.policy.decide(scan.scores)
    early, full = scan.answers[torch.arange(2400), taken].argmax(-1), rows.logits[:, -1].argmax(-1)
    by_hand = {
        "drop": (full == rows.labels).double() - (early == rows.labels).double(),
        "harm": ((full == rows.labels) & (early != rows.labels)).double(),
        "disagreement": (early != full).double(),
    }[risk]
    assert promise.mean_loss == pytest.approx(float(by_hand.mean()))
    assert result.mean_layers == pytest.approx(float((taken + 1).double().mean()))
    assert result.mean_layers < 4
    assert "With 90 % confidence over the draw of the 2400 certifying rows" in str(result)


def test_labels_are_not_read_where_disagreement_is_certified():
    trace = learned_trace(2000, seed=2)
    wrong = dataclasses.replace(trace, labels=(trace.labels + 1) % 3)
    target = Certified(0.05, risk="disagreement")
    found = [calibrate(part, "confidence", target, keep_weak_exits=True) for part in (trace, wrong)]
    assert found[0].promise.mean_loss == found[1].promise.mean_loss
    assert found[0].policy.thresholds == found[1].policy.thresholds


def test_every_label_keeps_the_promise_and_the_worst_is_named():
    trace = learned_trace(6000, seed=3)
    hard = trace.labels == 2
    logits = trace.logits.clone()
    swapped = hard & (torch.rand(6000, generator=torch.Generator().manual_seed(0)) < 0.5)
    logits[swapped, :2] = logits[swapped, :2].roll(1, -1) + 3 * torch.eye(3)[1]  # confidently wrong at first, one label only
    trace = dataclasses.replace(trace, logits=logits)
    whole = calibrate(trace, "confidence", Certified(0.05, risk="harm"), keep_weak_exits=True)
    each = calibrate(trace, "confidence", Certified(0.05, risk="harm", by="label"), keep_weak_exits=True)
    assert [group.name for group in each.promise.groups] == ["label 0", "label 1", "label 2"]
    assert each.promise.worst.name == "label 2"
    assert each.mean_layers > whole.mean_layers  # the promise is dearer
    harmed = replay(whole.policy, trace.select(trace.labels == 2))
    assert harmed.full_quality - harmed.quality > 0.05  # what "all rows" hid
    kept = replay(each.policy, trace.select(trace.labels == 2))
    assert kept.full_quality - kept.quality < 0.05
    assert all(group.p_value <= 0.15 for group in each.promise.groups)


def test_slices_follow_their_rows_through_the_split():
    trace = learned_trace(3000, seed=4)
    groups = (trace.logits[:, 0, 0] > 0).long().numpy()
    result = calibrate(trace, "confidence", Certified(0.1, risk="harm", by="group"), groups=groups)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[600:]
    assert [group.num_rows for group in result.promise.groups] == np.bincount(groups[order.numpy()]).tolist()
    with pytest.raises(CalibrationError, match="groups has shape"):
        calibrate(trace, "confidence", Certified(0.1, by="group"), groups=groups[:10])
    with pytest.raises(CalibrationError, match="groups are float64; expected a whole number or a name"):
        calibrate(trace, "confidence", Certified(0.1, by="group"), groups=np.where(groups == 1, np.nan, groups))
    with pytest.raises(CalibrationError, match="by is 'group'"):
        calibrate(trace, "confidence", Certified(0.1, by="group"))


def test_many_labels_and_values():
    many = learned_trace(2000, problem_type=MULTI_LABEL)
    assert calibrate(many, "confidence", Certified(0.05)).mean_layers < 4
    values = learned_trace(2000, classes=1, problem_type=REGRESSION)
    options = {"options": {"tolerance": 0.2}}
    with pytest.raises(CalibrationError, match="bound is None"):
        calibrate(values, "patience", Certified(0.05), **options)
    assert calibrate(values, "patience", Certified(0.05, bound=4.0), **options).promise.bound == 4.0
    with pytest.raises(CalibrationError, match="hardly ever agree"):
        calibrate(values, "patience", Certified(0.05, risk="disagreement"), **options)


def test_a_promise_survives_its_file(tmp_path):
    result = calibrate(learned_trace(2000), "confidence", "certified:0.05@0.9")
    result.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == result
    stored = json.loads((tmp_path / "calibration.json").read_text())["promise"]
    assert (stored["limit"], stored["confidence"], stored["num_rows"]) == (0.05, 0.9, 1600)


def test_more_rows_certify_more_and_are_asked_for():
    few, many = (
        calibrate(learned_trace(count, seed=6), "confidence", Certified(0.03, risk="harm")) for count in (600, 20_000)
    )
    assert many.mean_layers < few.mean_layers
    assert few.promise.rows_needed > few.promise.num_rows
    assert any(f"{few.promise.rows_needed:,} certifying rows" in note for note in few.notes)


@pytest.mark.parametrize("procedure", ["fixed-sequence", "fallback", "crc"])
@pytest.mark.parametrize("risk", ["drop", "harm"])
def test_more_rows_are_asked_for_than_there_are(procedure, risk):
    """Gains make a mean loss less certain, and risk control goes by another formula: neither is forgotten."""
    asked = []
    for seed in range(4):
        promise = calibrate(
            learned_trace(2000, seed=seed), "confidence", Certified(0.05, 0.9, risk=risk, procedure=procedure)
        ).promise
        asked.append(promise.rows_needed)
        assert promise.rows_needed is None or promise.rows_needed > promise.num_rows
    assert procedure == "crc" or any(asked)


def test_the_next_setting_takes_what_was_asked_for():
    """By hand: 60 losses and 20 gains among 1,000 rows, a limit of .05 at 90 %, and the same rates among more."""
    scores, losses = np.zeros((1000, 2)), np.zeros((1000, 2))
    losses[:60, 0], losses[60:80, 0] = 1.0, -1.0
    everybody, path = {"all rows": np.ones(1000, dtype=bool)}, np.array([[np.nan], [0.0]])
    walked = module.walk_of_rows(Certified(0.05, 0.9), Losses(losses, -1.0, 1.0), scores, path, everybody, (scores, losses))
    assert walked.last_certified() == 0
    needed, (plan,) = walked.promise(0, 500).rows_needed, walked.plans
    assert needed > 1000

    def p_value(count):
        tally = Tally(np.array([-1.0, 0.0, 1.0]), np.array([0.02, 0.92, 0.06]) * count)
        return Losses(losses, -1.0, 1.0).p_value(tally, 0.05, plan)

    assert p_value(needed) <= 0.1 < p_value(needed * 0.9)
    controlled = module.walk_of_rows(
        Certified(0.05, procedure="crc"), Losses(np.abs(losses), 0.0, 1.0), scores, path, everybody, (scores, losses)
    )
    assert controlled.promise(0, 500).rows_needed is None  # 80 of 1,000 is above the limit


def test_without_labels_quality_is_agreement():
    trace = learned_trace(2000)
    traffic = dataclasses.replace(trace, labels=trace.logits[:, -1].argmax(-1), labelled=False)
    words = calibrate(traffic, "confidence", Certified(0.05, 0.9)).promise.in_words()
    assert (
        "the full model's mean quality (agreement with the full model) exceeds the early answers' by at most 0.05" in words
    )
    harm = calibrate(traffic, "confidence", Certified(0.05, 0.9, risk="harm")).promise.in_words()
    assert "lose at most 0.05 of quality (agreement with the full model) on average" in harm


def test_a_promise_speaks_of_what_was_certified():
    """Many labels lose parts; values in units of their bound: neither is told as a share of rows that are wrong."""
    many = calibrate(learned_trace(2000, problem_type=MULTI_LABEL), "confidence", Certified(0.1, 0.9, risk="harm")).promise
    assert "lose at most 0.1 of quality (share of right labels) on average, gains not counted" in many.in_words()
    values = learned_trace(2000, classes=1, problem_type=REGRESSION)
    options = {"options": {"tolerance": 0.2}}
    value = calibrate(values, "patience", Certified(0.05, 0.9, bound=4.0), **options).promise
    assert "(minus squared error) exceeds the early answers' by at most 0.2, differences cut to 4" in value.in_words()
    with pytest.raises(CalibrationError, match="rows of labels lose no more than 1 each"):
        calibrate(learned_trace(2000), "confidence", Certified(0.05, bound=4.0))


def test_copies_are_warned_of():
    trace = learned_trace(1500)
    copied = trace.select(torch.cat([torch.arange(1500), torch.arange(100)]))
    assert any("100 of 1600 rows are copies" in note for note in calibrate(copied, "confidence", Certified(0.05)).notes)
    assert not any("copies" in note for note in calibrate(trace, "confidence", Certified(0.05)).notes)


def test_rows_that_taught_a_policy_do_not_certify_it():
    trace = learned_trace(3000)
    teaching, others = trace.select(torch.arange(1000)), trace.select(torch.arange(1000, 3000))
    policy = POLICIES.get("beem-calibrated").from_trace(teaching)
    with pytest.raises(CalibrationError, match=r"1 of 2001 rows, row 2000 the first, are among those that") as caught:
        calibrate(
            trace.select([*range(1000, 3000), 7]), policy, Certified(0.05), learned_from=teaching, keep_weak_exits=True
        )
    assert (caught.value.field, caught.value.value) == ("learned_from", 2000)
    rounded = dataclasses.replace(teaching, logits=teaching.logits.half())
    with pytest.raises(CalibrationError, match=r"1000 of 3000 rows"):
        calibrate(trace, policy, Certified(0.05), learned_from=rounded, keep_weak_exits=True)
    named = dataclasses.replace(trace, fingerprint="a")
    for field, value in {"exit_layers": (1, 2, 3, 5), "fingerprint": "b"}.items():
        other_model = dataclasses.replace(teaching, **{field: value})
        with pytest.raises(CalibrationError, match=f"learned_from has {field}"):
            calibrate(named, policy, Certified(0.05), learned_from=other_model)
    result = calibrate(others, policy, Certified(0.05), learned_from=teaching, keep_weak_exits=True)
    assert result.policy.may_leave
    assert not any("learned elsewhere" in note for note in result.notes)
    assert any("learned elsewhere" in note for note in calibrate(others, policy, Certified(0.05)).notes)
    by_name = calibrate(others, "beem-calibrated", Certified(0.05))  # learns on rows of its own
    assert not any("learned elsewhere" in note for note in by_name.notes)


def test_one_row_certifies_nothing():
    with pytest.raises(CalibrationError, match="1 rows cannot be split"):
        calibrate(learned_trace(1), "confidence", Certified(0.05))
    with pytest.raises(CalibrationError, match=r"1 certifying rows cannot certify 0.05 at 0.95: 59 without"):
        calibrate(learned_trace(2), "confidence", Certified(0.05, risk="harm"), learning_share=0.5, keep_weak_exits=True)


def test_rows_of_one_label_certify_that_label_only():
    """A constant answer is right on all of them, so every exit is weak there and nobody leaves unless told otherwise."""
    trace = learned_trace(4000, seed=5)
    ones = trace.select(trace.labels == 1)
    closed = calibrate(ones, "confidence", Certified(0.1, risk="harm"))
    assert closed.mean_layers == 4
    assert any("no better than the most frequent answer" in note for note in closed.notes)
    opened = calibrate(ones, "confidence", Certified(0.1, risk="harm", by="label"), keep_weak_exits=True)
    assert [group.name for group in opened.promise.groups] == ["label 1"]


def test_logits_that_are_not_finite_certify_nothing():
    trace = learned_trace(400)
    logits = trace.logits.clone()
    logits[17, 2, 0] = math.nan
    with pytest.raises(DataError, match="Row 17 has a value in logits that is not finite"):
        dataclasses.replace(trace, logits=logits)


def test_a_promise_of_another_model_is_refused():
    """Other exits, layers or kinds of labels: the policy is not of this trace."""
    policy = calibrate(learned_trace(2000), "confidence", Certified(0.05)).policy
    for other in (
        learned_trace(2000, exits=6),
        dataclasses.replace(learned_trace(2000), exit_layers=(2, 4, 6, 8)),
        learned_trace(2000, problem_type=MULTI_LABEL),
    ):
        with pytest.raises(CalibrationError, match="must be of one model"):
            calibrate(other, policy, Certified(0.05))


def test_f1_cannot_be_certified():
    with pytest.raises(CalibrationError, match="no mean over rows"):
        calibrate(learned_trace(2000, classes=2), "confidence", Certified(0.05), metric="f1-macro")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"drop": 0}, "drop"),
        ({"drop": 1.0}, "drop"),
        ({"drop": 1.5}, "drop"),
        ({"drop": -0.01}, "drop"),
        ({"drop": math.nan}, "drop"),
        ({"drop": True}, "drop"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 1.5}, "confidence"),
        ({"confidence": 0.3}, "confidence"),
        ({"confidence": -0.95}, "confidence"),
        ({"confidence": math.nan}, "confidence"),
        ({"risk": "harms"}, "risk"),
        ({"procedure": "ltt"}, "procedure"),
        ({"by": "class"}, "by"),
        ({"bound": 0}, "bound"),
        ({"bound": math.inf}, "bound"),  # every loss would be none
        ({"bound": math.nan}, "bound"),
    ],
)
def test_impossible_promises_are_refused(fields, field):
    with pytest.raises(CalibrationError) as caught:
        Certified(**{"drop": 0.01, **fields})
    assert caught.value.field == field


def test_words_and_print():
    assert parse_target("certified:0.02") == Certified(0.02)
    assert parse_target("certified:0.02@0.9") == Certified(0.02, 0.9)
    assert parse_target("certified:0.02:risk=harm:by=label") == Certified(0.02, risk="harm", by="label")
    for words in ("certified:0.02:risk=harms", "certified:0", "certified:1.5@0.9", "certified:0.01@1", "certified:0.01@nan"):
        with pytest.raises(CalibrationError, match=r"write it like `certified:0.01@0.95:risk=harm`"):
            parse_target(words)
    assert parse_target(str(Certified(0.02, by="label"))) == Certified(0.02, by="label")
    for number in (np.float64(0.25), np.float32(0.25), torch.tensor(0.25)):
        assert parse_target(str(Certified(number, 1 - number))) == Certified(0.25, 0.75)


def test_train_rows_and_no_rows_are_refused():
    for trace in (learned_trace(0), learned_trace(1000, split="train")):
        with pytest.raises(CalibrationError):
            calibrate(trace, "confidence", Certified(0.05))


def test_it_is_the_same_every_time():
    trace = learned_trace(2000)
    for target in (Certified(0.05), MaxDrop(0.02)):
        first, second = (calibrate(trace, "beem-a", target, seed=3) for _ in range(2))
        assert first == second
        other = calibrate(trace, "beem-a", target, seed=4)
        assert (first.policy, first.expected or first.promise) != (other.policy, other.expected or other.promise)


def test_sst2_at_one_point(data_path):
    """3,000 held-back rows certify one point at 90 % with at least twice the speed in layers; dev keeps it."""
    trace = sst2_trace(data_path, "mean-pooled")
    result = calibrate(trace, "confidence", Certified(0.01, 0.9))
    dev = replay(result.policy, sst2_trace(data_path, "mean-pooled", "dev"))
    assert result.layer_speed_up >= 2
    assert dev.full_quality - dev.quality <= 0.01


# --- what to expect ---------------------------------------------------------------------------------------------------


def test_what_is_expected_is_what_new_rows_get():
    """A hundred small choices: their own rows flatter them, `expected` does not."""
    pool = learned_trace(8000, seed=9)
    seen, expected, real = [], [], []
    for seed in range(60):
        order = torch.randperm(8000, generator=torch.Generator().manual_seed(seed))
        result = calibrate(pool.select(order[:250]), "confidence", MaxDrop(0.0), per_exit=True, min_leavers=1)
        others = replay(result.policy, pool.select(order[250:]))
        seen.append(result.quality - result.full_quality)
        expected.append(result.expected.difference)
        real.append(others.quality - others.full_quality)
    assert np.mean(seen) >= 0
    assert np.mean(real) < -0.004
    assert np.mean(expected) == pytest.approx(np.mean(real), abs=0.004)


def test_folds_do_not_choose_what_they_judge(monkeypatch):
    trace = learned_trace(260)
    chosen, judged, real = [], [], cross_fit._judged

    def spy(recipe, pool, others, fold):
        chosen.append(set(others.tolist()))
        judged.append(set(fold.tolist()))
        return real(recipe, pool, others, fold)

    monkeypatch.setattr(cross_fit, "_judged", spy)
    result = calibrate(trace, "confidence", MaxDrop(0.0))
    assert result.expected.num_folds == 5
    assert all(not one & other and one | other == set(range(260)) for one, other in zip(chosen, judged, strict=True))
    assert set.union(*judged) == set(range(260))
    assert sum(map(len, judged)) == 260
    assert min(map(len, judged)) >= 50


@pytest.mark.parametrize("policy", ["confidence", "beem-calibrated", "reward"])
@pytest.mark.parametrize("metric", ["accuracy", "f1-macro"])
def test_rows_that_are_left_out_leave_no_trace_in_a_choice(policy, metric):
    trace, fold = learned_trace(400), torch.arange(100)
    odd = dataclasses.replace(
        trace, logits=trace.logits.index_fill(0, fold, 0.25), labels=trace.labels.index_fill(0, fold, 1)
    )
    recipe = Recipe(
        policy=policy,
        target=MaxDrop(0.02),
        metric=find_metric(metric, trace.problem_type),
        per_exit=False,
        options={},
        keep_weak_exits=False,
        min_leavers=1,
        learning_share=0.3,
        seed=0,
        every=1,
    )
    made = [choose(recipe, Pool(part, recipe.metric), torch.arange(100, 400)).policy for part in (trace, odd)]
    assert made[0] == made[1]
    assert made[0].may_leave


def test_the_number_of_folds(monkeypatch):
    """Ten, of many rows five, of few as many as have 50 rows each, or none; the caller's where given."""
    sizes, real = [], cross_fit._judged

    def spy(recipe, pool, others, fold):
        sizes.append((len(others), len(fold)))
        return real(recipe, pool, others, fold)

    monkeypatch.setattr(cross_fit, "_judged", spy)
    for rows, given, wanted in (
        (99, None, 0),
        (120, None, 2),
        (549, None, 10),
        (10_000, None, 10),
        (10_001, None, 5),
        (549, 3, 3),
        (549, 50, 10),
        (550, 50, 11),
        (549, 0, 0),
        (549, 1, 0),
    ):
        sizes.clear()
        expected = calibrate(learned_trace(rows, exits=2), "confidence", folds=given).expected
        assert (expected.num_folds if wanted else expected) == (wanted or None)
        assert len(sizes) == wanted
        assert all(others + fold == rows and fold in (rows // wanted, rows // wanted + 1) for others, fold in sizes)
        assert sum(fold for _, fold in sizes) == (rows if wanted else 0)
        assert min((fold for _, fold in sizes), default=50) >= 50


def test_an_expectation_that_breaks_the_target_is_said():
    pool = learned_trace(6000, seed=9)
    notes = []
    for seed in range(12):
        order = torch.randperm(6000, generator=torch.Generator().manual_seed(seed))[:150]
        notes += calibrate(pool.select(order), "confidence", MaxDrop(0.0), per_exit=True, min_leavers=1).notes
    assert any("sigmas=1" in note and "certified:" in note for note in notes)
    quiet = calibrate(learned_trace(3000), "confidence", MaxDrop(0.1))
    assert not any("not seen" in note for note in quiet.notes)

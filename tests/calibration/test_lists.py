"""Promises about lists: the metric of a list by hand, lists that stay whole, and as many broken promises as are allowed."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import ndcg_score

from hf_earlyexit import ExitTrace
from hf_earlyexit.calibration import CalibrationResult, Certified, calibrate
from hf_earlyexit.calibration.evidence import binomial_p
from hf_earlyexit.calibration.lists import ListQuality, Lists, ListsAlong
from hf_earlyexit.calibration.walk import Walk
from hf_earlyexit.errors import CalibrationError
from hf_earlyexit.policies.scanning import Scan
from hf_earlyexit.problem_types import REGRESSION, SINGLE_LABEL
from tests.samples import learned_trace

EVERYBODY = "all lists"


def of_lists(count=1000, size=6, seed=0, noise=(1.2, 0.6, 0.1)):
    """A trace of queries with a few candidates each; every exit says how relevant they are, the later the better."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(size=(count * size, 1)) + 0.5 * np.repeat(draw.normal(size=(count, 1)), size, 0)
    values = [truth + draw.normal(size=truth.shape) * part for part in noise]
    logits = np.stack([np.concatenate([-value / 2, value / 2], 1) for value in values], 1).astype(np.float32)
    relevant = (truth[:, 0] + 0.3 * draw.normal(size=count * size) > 0.7).astype(np.int64)
    trace = ExitTrace(
        logits=torch.from_numpy(logits), labels=torch.from_numpy(relevant), exit_layers=(1, 2, 3), problem_type=SINGLE_LABEL
    )
    return trace, np.repeat(np.arange(count), size)


def shuffled(trace, lists, seed=0):
    order = np.random.default_rng(seed).permutation(trace.num_rows)
    return trace.select(torch.from_numpy(order)), lists[order]


def test_ndcg_and_mrr_by_hand_and_by_sklearn():
    member = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    scores = np.array([3.0, 2.0, 1.0, 0.1, 0.4, 0.3, 0.2, 5.0, 5.0])
    labels = np.array([0.0, 2.0, 1.0, 3.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    # list 0: relevances 0 2 1 in order; list 1: 0 1 0 3; list 2 cannot tell its rows apart: the worst order, 0 1
    gains = [3 / np.log2(3) + 1 / 2, 1 / np.log2(3) + 7 / np.log2(5), 1 / np.log2(3)]
    ideal = [3 + 1 / np.log2(3), 7 + 1 / np.log2(3), 1.0]
    assert ListQuality("ndcg", None).of(scores, labels, member, 3) == pytest.approx(np.array(gains) / ideal)
    assert ListQuality("mrr", None).of(scores, labels, member, 3).tolist() == [1 / 2, 1 / 2, 1 / 2]
    assert ListQuality("mrr:1", None).of(scores, labels, member, 3).tolist() == [0, 0, 0]
    first_two = [(3 / np.log2(3)) / ideal[0], (1 / np.log2(3)) / ideal[1], 1 / np.log2(3)]
    assert ListQuality("ndcg:2", None).of(scores, labels, member, 3) == pytest.approx(first_two)
    draw = np.random.default_rng(0)
    for places in (3, 8):
        relevance, said = draw.integers(0, 4, (20, 8)), draw.normal(size=(20, 8))
        ours = ListQuality(f"ndcg:{places}", None).of(
            said.ravel(), relevance.ravel().astype(float), np.repeat(np.arange(20), 8), 20
        )
        assert ours.mean() == pytest.approx(ndcg_score(2.0**relevance - 1, said, k=places))


def test_lists_without_anything_relevant_lose_nothing():
    zero = ListQuality("ndcg", None).of(np.array([1.0, 2.0]), np.zeros(2), np.zeros(2, dtype=np.int64), 1)
    assert zero.tolist() == [0.0]


def test_a_promise_about_lists_is_what_its_lists_show(tmp_path):
    """Worked out again, list by list, on the lists that certify; rows stand in any order."""
    trace, lists = shuffled(*of_lists())
    result = calibrate(trace, "confidence", Certified(0.03, 0.9), lists=lists, metric="ndcg:3")
    promise = result.promise
    assert (promise.unit, promise.num_rows, promise.num_path_rows) == ("lists", 800, 200)
    assert promise.measure == "ndcg:3 of a list"
    assert result.mean_layers < 3
    first, certifying = Lists.of(lists, trace.num_rows, "ndcg:3", None).split(trace.num_rows, 0.2, 0)
    assert not set(lists[first.numpy()]) & set(lists[certifying.numpy()])
    rows, here = trace.select(certifying), lists[certifying.numpy()]
    taken = result.policy.decide(result.policy.scan(rows).scores)
    answers = rows.logits.double().diff(dim=-1)[..., 0]
    early, full = answers[torch.arange(rows.num_rows), taken].numpy(), answers[:, -1].numpy()
    drops = []
    for one in np.unique(here):
        part = here == one
        gains = 2.0 ** rows.labels.numpy()[part] - 1
        if gains.any():
            drops.append(ndcg_score([gains], [full[part]], k=3) - ndcg_score([gains], [early[part]], k=3))
        else:
            drops.append(0.0)
    assert promise.mean_loss == pytest.approx(np.mean(drops))
    assert "over the draw of the 800 certifying lists, the full model's mean quality (ndcg:3 of a list)" in str(result)
    result.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == result


def test_one_value_ranks_like_two_labels():
    trace, lists = of_lists()
    values = dataclasses.replace(
        trace,
        logits=trace.logits.diff(dim=-1),
        labels=trace.labels.float(),
        problem_type=REGRESSION,
    )
    target, options = Certified(0.05, 0.9), {"tolerance": 0.3}
    result = calibrate(values, "patience", target, lists=lists, metric="mrr", options=options)
    assert result.promise.unit == "lists"
    assert result.mean_layers < 3


@pytest.mark.parametrize("risk", ["drop", "harm"])
def test_the_promise_about_lists_holds(risk):
    """Lists of known loss, drawn anew: a broken promise at most as often as is allowed, and the limit is used."""
    trace, _ = of_lists(4000, seed=1)
    limit, delta, draws, count = 0.05, 0.1, 150, 400
    ranking = trace.logits.double().diff(dim=-1)[..., 0].numpy()
    scores = torch.softmax(trace.logits, -1).amax(-1).double().numpy()
    path = np.stack([np.append(np.nan, np.linspace(1, 0.5, 20))] * 2, 1)
    labels, quality = trace.labels.double().numpy(), ListQuality("ndcg:3", None)

    def along(some):
        rows = (some[:, None] * 6 + np.arange(6)).ravel()
        member = np.repeat(np.arange(len(some)), 6)
        everybody = {EVERYBODY: np.ones(len(some), dtype=bool)}
        return ListsAlong(risk, quality, ranking[rows], labels[rows], member, scores[rows], path, everybody)

    everyone, before = along(np.arange(500, 4000)), along(np.arange(500))
    risks = np.array([everyone.at(place).mean() for place in range(len(path))])
    draw, used = np.random.default_rng(2), []
    for _ in range(draws):
        here = along(draw.integers(500, 4000, count))
        used.append(risks[Walk(Certified(limit, 1 - delta, risk=risk), here, before, here.parts, "lists").last_certified()])
    assert (np.array(used) > limit).sum() <= binom.ppf(0.999, draws, delta)
    assert np.mean(used) >= limit / 2


def test_rows_are_not_what_certifies_lists():
    """The mutant: candidates of a few queries, taken for as many independent rows, break the promise."""
    draw, limit, delta, draws, lists, size = np.random.default_rng(0), 0.05, 0.1, 400, 80, 25
    broken = {"lists": 0, "rows": 0}
    for _ in range(draws):
        bad = draw.random(lists) < 0.06  # all candidates of a list fail together; a risk above the limit
        broken["lists"] += binomial_p(bad.sum(), lists, limit) <= delta
        broken["rows"] += binomial_p(bad.sum() * size, lists * size, limit) <= delta
    assert broken["lists"] <= binom.ppf(0.999, draws, delta) < broken["rows"]


def test_slices_of_lists():
    trace, lists = shuffled(*of_lists(2000))
    slices = np.array(["long", "short"])[lists % 2]
    target = Certified(0.05, 0.9, by="group")
    result = calibrate(trace, "confidence", target, lists=lists, groups=slices)
    assert [group.name for group in result.promise.groups] == ["group long", "group short"]
    assert sum(group.num_rows for group in result.promise.groups) == 1600
    torn = slices.copy()
    torn[np.flatnonzero(lists == lists[0])[1]] = "short" if torn[0] == "long" else "long"
    with pytest.raises(CalibrationError, match="expected one group for each list"):
        calibrate(trace, "confidence", target, lists=lists, groups=torn, seed=1)
    with pytest.raises(CalibrationError, match="pass the number of each row's slice"):
        calibrate(trace, "confidence", target, lists=lists)


def hits(scores, labels):
    return 4.0 * labels[np.argmax(scores)]


def test_a_function_of_ones_own_needs_its_bound():
    trace, lists = of_lists()
    with pytest.raises(CalibrationError, match="bound is None; certifying hits of lists needs the most") as caught:
        calibrate(trace, "confidence", Certified(0.05), lists=lists, metric=hits)
    assert caught.value.field == "bound"
    wide, narrow = (
        calibrate(trace, "confidence", Certified(0.05, 0.9, bound=bound), lists=lists, metric=hits) for bound in (4.0, 1.0)
    )
    assert wide.promise.bound == 4.0
    assert "exceeds the early answers' by at most 0.2, differences cut to 4" in wide.promise.in_words()
    assert narrow.mean_layers >= wide.mean_layers  # cut to 1, a lost hit is a whole loss; of 4, too, but the limit is .2
    half = calibrate(trace, "confidence", Certified(0.05, 0.9, bound=8.0), lists=lists, metric=hits)
    assert (half.promise.mean_loss * 800 % 0.5) == pytest.approx(0)  # a lost hit is half of the bound
    assert (half.promise.mean_loss * 800) % 1 == pytest.approx(0.5)
    with pytest.raises(CalibrationError, match="gave 'many' for a list"):
        calibrate(trace, "confidence", Certified(0.05, bound=1.0), lists=lists, metric=lambda *_: "many")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lists": np.zeros(10)}, "lists has shape"),
        ({"lists": None, "metric": "ndcg:10"}, "ndcg:10 judges lists"),
        ({"metric": "ndcg:0"}, "lists are judged by"),
        ({"metric": "accuracy"}, "lists are judged by"),
        ({"metric": 3}, "metric is 3"),
        ({"target": "max-drop:0.01"}, "lists go with Certified"),
        ({"target": Certified(0.05, by="label")}, "Lists are certified together"),
        ({"target": Certified(0.05, risk="disagreement")}, "Lists have risk='drop'"),
        ({"target": Certified(0.001)}, r"800 certifying lists cannot certify 0.001 at 0.95: \d+ without a single loss"),
    ],
)
def test_what_lists_cannot_do(options, words):
    trace, lists = of_lists()
    given = {"target": Certified(0.05), "lists": lists, **options}
    with pytest.raises(CalibrationError, match=words):
        calibrate(trace, "confidence", given.pop("target"), **given)


def test_lists_that_cannot_be_ranked_or_split():
    trace, lists = of_lists(3)
    nothing, numbers = of_lists(100)
    nothing = dataclasses.replace(nothing, labels=torch.zeros_like(nothing.labels))
    with pytest.raises(CalibrationError, match="No row of any list has a label above 0"):
        calibrate(nothing, "confidence", Certified(0.1), lists=numbers)
    with pytest.raises(CalibrationError, match="1 lists cannot be split"):
        calibrate(trace, "confidence", Certified(0.05), lists=np.zeros(trace.num_rows, dtype=int))
    with pytest.raises(CalibrationError, match="lists are float64"):
        calibrate(trace, "confidence", Certified(0.05), lists=np.where(lists == 1, np.nan, lists))
    many = learned_trace(600)
    with pytest.raises(CalibrationError, match="3 labels; lists are ranked by one value"):
        calibrate(many, "confidence", Certified(0.3), lists=np.arange(600) // 3)
    signed = learned_trace(600, classes=1, problem_type=REGRESSION)
    with pytest.raises(CalibrationError, match="needs relevances of at least 0"):
        calibrate(signed, "patience", Certified(0.3), lists=np.arange(600) // 3, options={"tolerance": 0.2})


def test_the_full_model_is_what_full_depth_answers(monkeypatch):
    """Not what a policy says at the last exit, which nobody is served."""
    trace, lists = of_lists()
    usual = calibrate(trace, "confidence", Certified(0.05, 0.9), lists=lists)
    policy = type(usual.policy)
    real = policy.scan

    def odd(self, given):
        scores, answers = real(self, given)
        return Scan(scores, torch.cat([answers[:, :-1], -answers[:, -1:]], 1))

    monkeypatch.setattr(policy, "scan", odd)
    assert calibrate(trace, "confidence", Certified(0.05, 0.9), lists=lists).promise == usual.promise

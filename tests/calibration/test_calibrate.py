import dataclasses

import numpy as np
import pytest
import torch

from hf_earlyexit.calibration import FinalLayerError, LayerBudget, MaxDrop, SpeedUp, settings
from hf_earlyexit.errors import CalibrationError, PolicyError, UnknownNameError, UsageError
from hf_earlyexit.policies import POLICIES, BeemAccuracyPolicy, BeemCostPolicy, ConfidencePolicy
from hf_earlyexit.problem_types import MULTI_LABEL, PROBLEM_TYPES, REGRESSION
from tests.samples import learned_trace, options_for, sst2_trace

from . import calibrate

LEARNERS = [name for name in POLICIES.names() if POLICIES.get(name).learns]
OTHERS = [name for name in POLICIES.names() if not POLICIES.get(name).learns]


def threshold_rows(trace, seed, share=0.2):
    """The rows that a learning policy leaves to its thresholds, as documented: a seeded permutation, learning rows first."""
    order = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(seed))
    return trace.select(order[round(share * trace.num_rows) :])


@pytest.mark.parametrize("target", [MaxDrop(0.01), LayerBudget(3.0), FinalLayerError()], ids=str)
@pytest.mark.parametrize("per_exit", [True, False])
@pytest.mark.parametrize("name", POLICIES.names())
def test_the_policy_does_on_its_rows_what_the_result_says(name, per_exit, target):
    trace = learned_trace(300, seed=1)
    found = calibrate(trace, name, target, per_exit=per_exit, options=options_for(name), seed=5)
    rows = threshold_rows(trace, 5) if name in LEARNERS else trace
    taken = found.policy.decide(found.policy.scan(rows).scores).numpy()
    quality = rows.quality.numpy()
    early, last = quality[np.arange(len(taken)), taken], quality[:, -1]

    assert found.num_rows == rows.num_rows
    assert found.quality == pytest.approx(early.mean())
    assert found.full_quality == pytest.approx(last.mean())
    assert found.standard_error == pytest.approx((early - last).std() / np.sqrt(len(last)))
    assert found.mean_layers == found.mean_cost == pytest.approx((taken + 1).mean())
    assert found.layer_speed_up == pytest.approx(4 / (taken + 1).mean())
    assert [report.share for report in found.exits] == pytest.approx([(taken == index).mean() for index in range(4)])
    assert [report.layer for report in found.exits] == [1, 2, 3, 4]
    assert tuple(report.threshold for report in found.exits) == (*found.policy.thresholds, None)
    assert [report.quality for report in found.exits] == pytest.approx(quality.mean(0))
    for index, report in enumerate(found.exits):
        here = taken == index
        if here.any():
            assert report.quality_of_leavers == pytest.approx(quality[here, index].mean())
            assert report.last_quality_of_leavers == pytest.approx(quality[here, -1].mean())
        else:
            assert report.quality_of_leavers is report.last_quality_of_leavers is None


@pytest.mark.parametrize("per_exit", [True, False])
@pytest.mark.parametrize("name", POLICIES.names())
def test_every_point_of_the_curve_can_be_served(name, per_exit):
    trace = learned_trace(120, seed=2)
    found = calibrate(trace, name, "max-drop:0.05", per_exit=per_exit, options=options_for(name))
    rows = threshold_rows(trace, 0) if name in LEARNERS else trace
    scores = found.policy.scan(rows).scores
    assert len(found.curve) > 1
    for cost, quality, thresholds in found.curve[::7]:
        taken = found.policy.with_thresholds(thresholds).decide(scores).numpy()
        assert cost == pytest.approx((taken + 1).mean())
        assert quality == pytest.approx(rows.quality.numpy()[np.arange(len(taken)), taken].mean())
    assert found.curve[0][0] == 4
    assert found.curve[0][2] == (None, None, None)


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("name", POLICIES.names())
def test_every_policy_that_can_is_calibrated_for_many_labels_and_values(name, problem_type):
    trace = learned_trace(300, seed=3, problem_type=problem_type)
    options = options_for(name, problem_type)
    if problem_type not in POLICIES.get(name).problem_types:
        with pytest.raises(PolicyError, match=f"The {name} policy cannot serve {problem_type}"):
            calibrate(trace, name, MaxDrop(0.02), options=options)
        return
    for per_exit in (True, False):
        found = calibrate(trace, name, MaxDrop(0.05), per_exit=per_exit, options=options)
        assert found.policy.problem_type == problem_type
        assert found.quality >= found.full_quality - 0.05 - 1e-9
        assert found.layer_speed_up > 1 or name == "static"


def test_by_default_confidence_loses_nothing_with_one_threshold():
    found = calibrate(learned_trace(300, seed=1))
    assert (found.policy.name, found.target.split("(")[0]) == ("confidence", "MaxDrop")
    assert len(set(found.policy.thresholds)) == 1
    assert found.quality >= found.full_quality


def test_thresholds_are_per_exit_where_the_target_prefers_it_unless_told_otherwise():
    trace = learned_trace(500, exits=6, seed=1)
    assert len(set(calibrate(trace, "confidence", FinalLayerError()).policy.thresholds)) > 1
    assert len(set(calibrate(trace, "confidence", FinalLayerError(), per_exit=False).policy.thresholds)) == 1
    assert len(set(calibrate(trace, "confidence", MaxDrop(0.01), per_exit=True).policy.thresholds)) > 1


def test_a_target_in_words_is_the_target():
    trace = learned_trace(200)
    assert calibrate(trace, "confidence", "layer-budget:3") == calibrate(trace, "confidence", LayerBudget(3.0))


def test_the_same_call_gives_the_same_result_and_another_seed_other_rows():
    trace = learned_trace(200)
    assert calibrate(trace, "beem-a", MaxDrop(0.01), seed=3) == calibrate(trace, "beem-a", MaxDrop(0.01), seed=3)
    first, second = (calibrate(trace, "beem-a", MaxDrop(0.01), seed=seed).policy.weights for seed in (3, 4))
    assert first != second


def test_what_the_result_tells_about_its_origin():
    trace = learned_trace(200, split="dev", fingerprint="abc", meta={"dtype": "bfloat16"})
    found = calibrate(trace, "confidence", MaxDrop(0.01), seed=9)
    assert (found.split, found.fingerprint, found.dtype, found.seed) == ("dev", "abc", "bfloat16", 9)
    assert found.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found.policy.exit_layers == trace.exit_layers


def test_costs_other_than_layers_are_what_the_budget_is_spent_in():
    trace = learned_trace(300, cost=(1.0, 10.0, 20.0, 30.0), seed=1)
    found = calibrate(trace, "confidence", LayerBudget(12.0))
    assert found.mean_cost <= 12.0
    assert found.mean_cost > found.mean_layers
    assert calibrate(learned_trace(300, seed=1), "confidence", LayerBudget(12.0)).mean_cost <= 4


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize(("share", "expected"), [(0.3, 60), (0.5, 100), (0.01, 2)])
def test_learning_rows_and_threshold_rows_are_disjoint_and_counted(monkeypatch, name, share, expected):
    trace = learned_trace(200, seed=1)
    logits = trace.logits.clone()
    logits[:, 0, 0] = 5 + torch.arange(200) / 1024  # each row can be told from all others
    numbered = dataclasses.replace(trace, logits=logits)
    cls, seen = POLICIES.get(name), {}
    learn, curve = cls.learn.__func__, settings.policy_curve

    def rows_of(part):
        return set(part.logits[:, 0, 0].tolist())

    def spy_learn(cls, part, **options):
        seen["learning"] = rows_of(part)
        return learn(cls, part, **options)

    def spy_curve(recipe, policy, pool, places):
        seen.setdefault("thresholds", set()).update(rows_of(pool.trace.select(places)))
        return curve(recipe, policy, pool, places)

    monkeypatch.setattr(cls, "learn", classmethod(spy_learn))
    monkeypatch.setattr(settings, "policy_curve", spy_curve)
    found = calibrate(numbered, name, MaxDrop(0.05), learning_share=share, folds=0)
    assert not seen["learning"] & seen["thresholds"]
    assert seen["learning"] | seen["thresholds"] == rows_of(numbered)
    assert (found.num_learning_rows, found.num_rows) == (expected, 200 - expected)
    assert (len(seen["learning"]), len(seen["thresholds"])) == (expected, 200 - expected)


@pytest.mark.parametrize("name", OTHERS)
def test_a_policy_that_learns_nothing_uses_every_row_for_its_thresholds(name):
    found = calibrate(learned_trace(100), name, MaxDrop(0.05), options=options_for(name))
    assert (found.num_learning_rows, found.num_rows) == (0, 100)


# --- ready policies ---------------------------------------------------------------------------------------------------


def test_a_ready_policy_keeps_its_own_numbers():
    ready = BeemAccuracyPolicy(thresholds=(None,) * 3, weights=(0.1, 0.2, 0.3, 0.4), decay=0.5)
    found = calibrate(learned_trace(200), ready, MaxDrop(0.02))
    assert (found.policy.weights, found.policy.decay) == (ready.weights, 0.5)
    assert (found.num_learning_rows, found.num_rows) == (0, 200)
    assert found.policy.thresholds != ready.thresholds


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (ConfidencePolicy(thresholds=(None,) * 2), "3 exits, the trace 4"),
        (ConfidencePolicy(thresholds=(None,) * 3, exit_layers=(3, 6, 9, 12)), "layers"),
        (ConfidencePolicy(thresholds=(None,) * 3, problem_type=MULTI_LABEL), "multi_label_classification"),
    ],
    ids=["exits", "layers", "problem-type"],
)
def test_a_ready_policy_for_another_model_is_refused(policy, words):
    with pytest.raises(CalibrationError, match=words):
        calibrate(learned_trace(200), policy, MaxDrop(0.02))


def test_a_ready_policy_learns_for_which_layers_it_was_calibrated():
    found = calibrate(learned_trace(200), ConfidencePolicy(thresholds=(None,) * 3), MaxDrop(0.02))
    assert found.policy.exit_layers == (1, 2, 3, 4)


def test_options_go_with_a_name_only():
    with pytest.raises(UsageError, match="options go with a policy's name") as caught:
        calibrate(learned_trace(), ConfidencePolicy(thresholds=(None,) * 3), options={"muted": (0,)})
    assert caught.value.field == "options"


def test_options_reach_the_policy():
    found = calibrate(learned_trace(), "beem-c", MaxDrop(0.05), options={"layer_cost": 0.4, "reset": "zero"})
    assert found.policy.weights == pytest.approx((0.4, 0.8, 1.2, 1.6))
    assert found.policy.reset == "zero"
    assert isinstance(found.policy, BeemCostPolicy)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_rows_the_exits_were_trained_on_are_refused():
    with pytest.raises(CalibrationError, match=r"tagged 'train'.*held back") as caught:
        calibrate(learned_trace(split="train"))
    assert (caught.value.field, caught.value.value) == ("split", "train")


def test_an_empty_trace_is_refused():
    with pytest.raises(CalibrationError, match="no rows") as caught:
        calibrate(learned_trace().select([]))
    assert caught.value.field == "trace"


@pytest.mark.parametrize(("name", "meant"), [("beem_a", "beem-a"), ("confidense", "confidence")])
def test_an_unknown_policy_is_refused_with_the_nearest_name(name, meant):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{meant}'"):
        calibrate(learned_trace(), name)


def test_an_unknown_target_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'max-drop'"):
        calibrate(learned_trace(), "confidence", "maxdrop:0.1")


@pytest.mark.parametrize("target", [0.01, None, MaxDrop])
def test_what_is_no_target_is_refused_with_an_example(target):
    with pytest.raises(CalibrationError, match=r"expected a Target such as MaxDrop\(0\.01\)") as caught:
        calibrate(learned_trace(), "confidence", target)
    assert caught.value.field == "target"


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("confidence", {"patience": 3}, "patience"),
        ("beem-a", {"layer_cost": 0.1}, "layer_cost"),
        ("beem-c", {"layer_cost": -1}, "layer_cost"),
        ("beem", {}, "weights"),
        ("beem", {"weights": (1.0, 2.0)}, "weights"),
        ("confidence", {"thresholds": (0.1, 0.1, 0.1)}, "thresholds"),
        ("confidence", {"muted": (7,)}, "muted"),
        ("patience", {"tolerance": -1}, "tolerance"),
    ],
)
def test_a_wrong_option_is_refused_by_name(name, options, field):
    with pytest.raises(PolicyError) as caught:
        calibrate(learned_trace(), name, options=options)
    assert caught.value.field == field


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan"), True], ids=repr)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_learning_share_that_is_no_share_is_refused(name, share):
    with pytest.raises(CalibrationError, match="between 0 and 1") as caught:
        calibrate(learned_trace(), name, learning_share=share)
    assert caught.value.field == "learning_share"


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows_to_split_are_refused(rows):
    with pytest.raises(CalibrationError, match="cannot be split"):
        calibrate(learned_trace(rows), "beem-a", learning_share=0.1)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_model_with_its_last_exit_only_has_nothing_to_choose(problem_type):
    found = calibrate(learned_trace(50, exits=1, problem_type=problem_type), "static", MaxDrop(0.0))
    assert (found.policy.thresholds, found.layer_speed_up) == ((), 1.0)


def test_the_highest_score_there_is_can_be_the_threshold():
    # every exit is certain, and the first alone has weight: float32(.1) is a little above the double .1
    trace = learned_trace(60, seed=1)
    certain = 1e4 * torch.eye(3)[trace.labels][:, None].repeat(1, 4, 1)
    weights = {"weights": (0.1, 0.0, 0.0, 0.0)}
    found = calibrate(dataclasses.replace(trace, logits=certain), "beem", MaxDrop(0.0), options=weights)
    assert found.layer_speed_up == 4.0


# --- real rows --------------------------------------------------------------------------------------------------------


def test_on_real_sst2_rows_beem_a_is_nearly_twice_as_fast_and_as_good(data_path):
    found = calibrate(sst2_trace(data_path, "mean-pooled"), "beem-a", FinalLayerError())
    assert found.layer_speed_up >= 1.9
    assert found.quality >= found.full_quality
    assert found.num_rows + found.num_learning_rows == 3000


@pytest.mark.parametrize("name", ["beem-a", "beem-c", "confidence", "entropy", "margin", "patience"])
def test_on_real_sst2_rows_thresholds_hold_on_rows_they_never_saw(data_path, name):
    policy = calibrate(sst2_trace(data_path, "mean-pooled"), name, SpeedUp(1.6)).policy
    dev = sst2_trace(data_path, "mean-pooled", "dev")
    taken = policy.decide(policy.scan(dev).scores).numpy()
    quality = dev.quality.numpy()
    assert 12 / (taken + 1).mean() >= 1.45
    assert quality[np.arange(len(taken)), taken].mean() >= quality[:, -1].mean() - 0.02


def test_on_real_rows_dead_exits_would_fool_patience_and_are_muted(data_path):
    trace = sst2_trace(data_path, "first-token")
    fooled = calibrate(trace, "patience", LayerBudget(4), keep_weak_exits=True)
    assert fooled.quality < 0.6  # exits 1 to 6 agree with each other and know nothing
    found = calibrate(trace, "patience", MaxDrop(0.005))
    assert found.policy.muted == (0, 1, 2, 3, 4, 5)
    assert found.quality >= found.full_quality - 0.005
    assert found.layer_speed_up > 1.2


@pytest.mark.parametrize("name", ["beem-a", "beem-calibrated", "confidence"])
def test_a_rule_that_cannot_serve_values_refuses_before_it_learns(name):
    trace = learned_trace(classes=1, problem_type=REGRESSION)
    with pytest.raises(PolicyError, match=rf"The {name} policy cannot serve regression; these can: .*patience"):
        calibrate(trace, name)

import numpy as np
import pytest
import torch

from hf_earlyexit.calibration import (
    TARGETS,
    FinalLayerError,
    LayerBudget,
    MaxDrop,
    SpeedUp,
    parse_target,
)
from hf_earlyexit.calibration.search import Curve
from hf_earlyexit.errors import CalibrationError, UnknownNameError
from hf_earlyexit.policies import ConfidencePolicy
from hf_earlyexit.trace import ExitTrace
from tests.samples import learned_trace

from . import calibrate

# The full model costs 12; the second point is better and the third equal; two points tie in quality, two in cost.
CURVE = Curve(
    thresholds=np.full((6, 1), np.nan),
    cost=np.array([12.0, 10.0, 8.0, 6.0, 6.0, 4.0]),
    quality=np.array([0.90, 0.91, 0.90, 0.88, 0.89, 0.80]),
    standard_error=np.array([0.0, 0.002, 0.004, 0.006, 0.006, 0.02]),
)


@pytest.mark.parametrize(
    ("target", "point"),
    [
        (MaxDrop(0.0), 2),  # .90 at cost 8, not the better one at cost 10
        (MaxDrop(0.01), 4),  # .89 at cost 6
        (MaxDrop(0.02), 4),  # .88 and .89 both fit at cost 6: the better one
        (MaxDrop(0.1), 5),
        (MaxDrop(0.0, sigmas=1.0), 1),  # .90 - .004 is too little, .91 - .002 is not
        (MaxDrop(0.0, sigmas=10.0), 0),
        (LayerBudget(12), 1),  # the best there is
        (LayerBudget(9), 2),
        (LayerBudget(6), 4),
        (LayerBudget(4), 5),
        (SpeedUp(1), 1),
        (SpeedUp(1.5), 2),  # 12 / 1.5 = 8
        (SpeedUp(2.0), 4),
        (SpeedUp(3.0), 5),
        (FinalLayerError(), 2),  # no worse than the last layer, and cheapest
    ],
    ids=str,
)
def test_a_target_picks_the_point_worked_out_by_hand(target, point):
    assert target.pick(CURVE) == point


def test_of_equally_good_settings_the_cheapest_is_taken_and_of_equally_cheap_ones_the_best():
    cost, quality = np.array([12.0, 11.0, 9.0, 8.0, 8.0]), np.array([0.90, 0.90, 0.90, 0.85, 0.80])
    for order in (slice(None), slice(None, None, -1)):
        curve = Curve(np.full((5, 1), np.nan), cost[order], quality[order], np.zeros(5))
        best = int(np.flatnonzero(cost[order] == 9.0)[0])
        assert LayerBudget(12).pick(curve) == LayerBudget(9).pick(curve) == best
        cheap = int(np.flatnonzero(quality[order] == 0.85)[0])
        assert LayerBudget(8).pick(curve) == MaxDrop(0.2).pick(curve) == cheap
    assert SpeedUp(1).pick(Curve(np.full((5, 1), np.nan), cost, quality, np.zeros(5))) == 2


@pytest.mark.parametrize("target", [LayerBudget(3.9), SpeedUp(3.1)], ids=str)
def test_a_target_out_of_reach_says_what_is_reachable_and_what_to_do(target):
    with pytest.raises(CalibrationError, match=r"cheapest setting still costs 4\.00 layers.*keep_weak_exits") as caught:
        target.pick(CURVE)
    assert caught.value.field == "target"


def test_the_least_budget_reachable_is_met_to_the_digit():
    trace = learned_trace(exits=4, seed=2)
    least = calibrate(trace, "confidence", LayerBudget(4)).curve[-1][0]
    assert calibrate(trace, "confidence", LayerBudget(least)).mean_cost == pytest.approx(least)
    with pytest.raises(CalibrationError, match="a budget of"):
        calibrate(trace, "confidence", LayerBudget(least - 0.01))


@pytest.mark.parametrize("per_exit", [False, True])
@pytest.mark.parametrize("policy", ["confidence", "patience", "beem-a", "beem-c", "static"])
def test_every_target_is_met_on_the_rows_that_chose(policy, per_exit):
    trace = learned_trace(600, exits=6, seed=4)

    def run(target):
        return calibrate(trace, policy, target, per_exit=per_exit)

    for drop in (0.0, 0.005, 0.02, 0.1):
        found = run(MaxDrop(drop))
        assert found.quality >= found.full_quality - drop - 1e-9
    for ratio in (1.0, 1.3, 1.6):
        assert run(SpeedUp(ratio)).layer_speed_up >= ratio - 1e-9
    for layers in (6, 4.5, 3.5):
        assert run(LayerBudget(layers)).mean_cost <= layers + 1e-9
    strict = run(FinalLayerError())
    assert strict.quality >= strict.full_quality - 1e-9


def test_a_laxer_wish_never_costs_more():
    trace = learned_trace(600, exits=6, seed=5)
    layers = [calibrate(trace, "confidence", MaxDrop(drop)).mean_layers for drop in (0.0, 0.01, 0.03, 0.1)]
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > layers[-1]


def test_no_threshold_at_all_beats_the_one_that_max_drop_finds():
    trace = learned_trace(150, exits=4, seed=6)
    found = calibrate(trace, "confidence", MaxDrop(0.01))
    quality = trace.quality.numpy()
    policy = ConfidencePolicy.from_trace(trace)
    scores = policy.scan(trace).scores
    cheapest = 4.0
    for threshold in scores[:, :-1].unique().tolist():
        taken = policy.with_thresholds(threshold).decide(scores).numpy()
        if quality[np.arange(150), taken].mean() >= quality[:, -1].mean() - 0.01 - 1e-12:
            cheapest = min(cheapest, float((taken + 1).mean()))
    assert found.mean_layers == pytest.approx(cheapest)


def test_the_paired_rule_holds_at_each_exit():
    found = calibrate(learned_trace(800, exits=6, seed=7), "confidence", FinalLayerError())
    opened = [report for report in found.exits[:-1] if report.share > 0]
    assert opened
    for report in opened:
        assert report.quality_of_leavers >= report.last_quality_of_leavers - 1e-9
        assert report.share * 800 >= 10 - 1e-9


def test_the_literal_rule_holds_at_each_exit():
    trace = learned_trace(800, exits=6, seed=7)
    found = calibrate(trace, "confidence", FinalLayerError(paired=False))
    opened = [report for report in found.exits[:-1] if report.share > 0]
    assert opened
    for report in opened:
        assert 1 - report.quality_of_leavers < 1 - found.full_quality


def test_the_literal_rule_needs_a_last_layer_that_errs():
    trace = learned_trace(200, seed=1)
    perfect = type(trace)(logits=trace.logits, labels=trace.logits[:, -1].argmax(-1), exit_layers=trace.exit_layers)
    found = calibrate(perfect, "confidence", FinalLayerError(paired=False))
    assert found.policy.thresholds == (None, None, None)  # p = 0: no error rate is below it


def test_reserve_makes_the_rule_stricter():
    trace = learned_trace(800, exits=6, seed=9)
    free, careful = (calibrate(trace, "confidence", FinalLayerError(sigmas=s)) for s in (0.0, 1.0))
    assert careful.mean_layers > free.mean_layers


def test_the_literal_rule_has_no_single_threshold():
    with pytest.raises(CalibrationError, match="per_exit=True") as caught:
        calibrate(learned_trace(), "confidence", FinalLayerError(paired=False), per_exit=False)
    assert caught.value.field == "per_exit"


BAD = [float("nan"), float("inf"), float("-inf"), -0.5, True, False, "0.5", None]


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize(
    ("make", "field"),
    [
        (MaxDrop, "drop"),
        (SpeedUp, "ratio"),
        (LayerBudget, "layers"),
        (lambda sigmas: MaxDrop(0.1, sigmas=sigmas), "sigmas"),
        (lambda sigmas: FinalLayerError(sigmas=sigmas), "sigmas"),
    ],
    ids=["drop", "ratio", "layers", "drop-sigmas", "error-sigmas"],
)
def test_numbers_that_cannot_be_met_are_refused_by_name(make, field, bad):
    with pytest.raises(CalibrationError, match=f"{field} is .* expected a finite number from") as caught:
        make(bad)
    assert caught.value.field == field


@pytest.mark.parametrize(("make", "value"), [(SpeedUp, 0.99), (LayerBudget, 0)])
def test_numbers_just_out_of_range_are_refused(make, value):
    with pytest.raises(CalibrationError):
        make(value)


def test_the_bound_of_the_theorem_by_hand():
    # p = .2 is odds of 1/4; a / b^(i - 1): 1, 2/2, 3/9; odds 1/4, 1/4, 1/12
    target = FinalLayerError(paired=False, a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0])
    assert target.bound(0.2, 4) == pytest.approx([1 / 5, 1 / 5, 1 / 13])


@pytest.mark.parametrize(
    "constants", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], ["x", 1.0]], ids=repr
)
@pytest.mark.parametrize("name", ["a", "b"])
def test_constants_of_the_theorem_are_numbers_above_zero_one_per_early_exit(name, constants):
    with pytest.raises(CalibrationError) as caught:
        FinalLayerError(paired=False, **{name: constants}).bound(0.1, 3)
    assert caught.value.field == name


def test_constants_of_the_theorem_belong_to_the_literal_rule():
    with pytest.raises(CalibrationError, match="paired=False"):
        FinalLayerError(a=[1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("max-drop:0.01", MaxDrop(0.01)),
        ("max-drop:0", MaxDrop(0.0)),
        ("speed-up:2", SpeedUp(2.0)),
        ("layer-budget:5.5", LayerBudget(5.5)),
        ("final-layer-error", FinalLayerError()),
        ("max-drop:0.01:sigmas=1", MaxDrop(0.01, sigmas=1.0)),
        ("max-drop: drop=0.02 : sigmas=0.5", MaxDrop(0.02, sigmas=0.5)),
        ("final-layer-error:sigmas=2", FinalLayerError(sigmas=2.0)),
        ("final-layer-error:paired=false:a=[1,2]", FinalLayerError(paired=False, a=[1, 2])),
        ("MaxDrop(0.02)", MaxDrop(0.02)),
        ("FinalLayerError(sigmas=2.0)", FinalLayerError(sigmas=2.0)),
    ],
)
def test_words_become_a_target(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "max-drop",
        "max-drop:",
        "max-drop:abc",
        "max-drop:nan",
        "max-drop:-1",
        "speed-up:0.5",
        "speed-up:inf",
        "layer-budget:1:2",
        "max-drop:0.01:sgmas=1",
        "max-drop:0.01:drop=2",
        "max-drop:0.01:sigmas=-1",
        "max-drop:0.01:sigmas=__import__('os')",
        "max-drop:{[]}",
        "final-layer-error:paired=maybe",
    ],
)
def test_words_with_a_missing_or_impossible_number_are_refused_with_an_example(text):
    with pytest.raises(CalibrationError, match="write it like") as caught:
        parse_target(text)
    assert caught.value.value == text


@pytest.mark.parametrize("text", ["final-layer-error:0.01", "final-layer-error:0", "final-layer-error:1"])
def test_a_number_for_a_target_that_has_none_is_refused(text):
    with pytest.raises(CalibrationError):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("max-dorp:0.1", "max-drop"), ("speedup:2", "speed-up"), ("final_layer_error", "final-layer-error")]
)
def test_a_misspelt_target_gets_the_nearest_name(text, meant):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{meant}'"):
        parse_target(text)


@pytest.mark.parametrize("name", TARGETS.names())
def test_the_example_in_errors_is_a_target(name):
    cls = TARGETS.get(name)
    assert isinstance(parse_target(f"{name}:{cls.example}"), cls)


def test_a_drop_meant_in_points_is_warned_of_and_one_that_permits_ignorance_is_noted():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (400,))
    sure = torch.tensor([0.5, 1.0, 6.0])
    logits = torch.eye(2)[labels][:, None] * sure[:, None] + torch.randn(400, 3, 2)
    trace = ExitTrace(logits=logits, labels=labels, exit_layers=(1, 2, 3))
    for drop in ("1", "1.5"):  # as much as the full model has, and more
        with pytest.warns(UserWarning, match=rf"A drop of {drop} permits to lose all of .*{drop} points are 0\.0") as caught:
            result = calibrate(trace, "confidence", f"max-drop:{drop}")
        assert len(caught) == 1  # the folds of the expectation say nothing
        assert caught[0].filename == __file__
        assert [note for note in result.notes if f"a drop of {drop} permits to lose all of the full model's quality" in note]
    ignorant = ExitTrace(logits=logits.flip(1, -1), labels=labels, exit_layers=(1, 2, 3))  # worse than a constant answer
    with pytest.warns(UserWarning, match="A drop of 0.9 permits to lose all"):
        calibrate(ignorant, "confidence", "max-drop:0.9", keep_weak_exits=True)
    assert not any("no better than" in note for note in calibrate(trace, "confidence", "max-drop:0.01").notes)
    assert any("no better than" in note for note in calibrate(trace, "confidence", "max-drop:0.6").notes)
    values = ExitTrace(logits=logits[..., :1], labels=logits[:, 2, 0], exit_layers=(1, 2, 3), problem_type="regression")
    found = calibrate(values, "patience", "max-drop:30", options={"tolerance": 0.1}, keep_weak_exits=True)
    assert found.mean_layers < 3  # squared errors have no end, so neither has a drop


def test_a_target_shows_its_numbers():
    assert str(LayerBudget(5.0)) == "LayerBudget(layers=5.0)"
    assert "sigmas=1.5" in str(FinalLayerError(sigmas=1.5))


def test_every_target_by_name_is_tried_here():
    tried = {
        type(parse_target(text))
        for text in ("max-drop:0", "speed-up:2", "layer-budget:5", "final-layer-error", "certified:0.01")
    }
    assert tried == {TARGETS.get(name) for name in TARGETS.names()}


def test_numbers_of_numpy_and_torch_are_printed_as_python_does():
    for number in (np.float64(0.25), np.float32(0.25), torch.tensor(0.25)):
        assert parse_target(str(MaxDrop(number, sigmas=number))) == MaxDrop(0.25, sigmas=0.25)
    printed = FinalLayerError(paired=False, a=np.array([1.0, 2.0]))
    assert parse_target(str(printed)) == FinalLayerError(paired=False, a=[1.0, 2.0])

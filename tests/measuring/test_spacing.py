"""Exits every so many layers, chosen by what layers and exits cost.

Time is counted, not measured: a hook on every layer and every exit moves the clock on.
"""

from collections import Counter

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.calibration import Certified, LayerBudget, SpeedUp
from hf_earlyexit.errors import CalibrationError, UnknownNameError, UsageError
from hf_earlyexit.measuring.spacing import measure_step_costs, space_exits, spacings
from hf_earlyexit.policies import POLICIES
from tests.families.tiny import new_model
from tests.samples import learned_trace, options_for

LAYERS = 6


class Counted:
    """A model whose parts take a known time.

    Attributes:
        parts: how often layers and exits have run.
    """

    def __init__(self, model, layer, asking):
        self.model, self.now, self.parts = model, 0.0, Counter()
        prices = {"layer": layer, "exit": asking}

        def priced(kind):
            def hook(*_):
                self.now += prices[kind]
                self.parts[kind] += 1

            return hook

        for part in model.family.layers_of(model.base_model):
            part.register_forward_hook(priced("layer"))
        for head in (*model.exit_heads.values(), model.classifier):
            head.register_forward_hook(priced("exit"))

    def clock(self):
        return self.now


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def trace():
    return learned_trace(400, exits=LAYERS, seed=1)


@pytest.mark.parametrize("name", ["confidence", "patience", "beem-a", "reward"])
def test_costs_are_found_row_by_row(model, trace, name):
    policy = ee.calibrate(trace, name, "max-drop:0.05", folds=0).policy
    counted = Counted(model, layer=3.0, asking=2.0)
    costs = measure_step_costs(model, policy, "latency", counted.clock)
    assert costs == pytest.approx((0.0, 3.0, 2.0))


def test_costs_of_many_rows_are_of_a_row(model, trace):
    policy = ee.calibrate(trace, "confidence", "max-drop:0.05", folds=0).policy
    costs = measure_step_costs(model, policy, "throughput", Counted(model, layer=3.0, asking=2.0).clock)
    assert costs.exit / costs.layer == pytest.approx(2 / 3)
    assert 0 < costs.layer < 1  # many rows share a call


@pytest.mark.parametrize("name", sorted({*POLICIES.names()} - {"gate"}))  # the model has no gates
def test_nobody_leaves_while_costs_are_measured_and_the_rule_is_as_it_was(model, trace, name):
    """Heads so sure that scores reach any threshold."""
    with torch.no_grad():
        for head in model.exit_heads.values():
            for weight in head.parameters():
                weight.mul_(1e4)
    policy = ee.calibrate(trace, name, "max-drop:0.2", folds=0, options=options_for(name, exits=LAYERS)).policy
    before = policy.to_dict()
    costs = measure_step_costs(model, policy, "latency", Counted(model, layer=3.0, asking=2.0).clock)
    assert costs == pytest.approx((0.0, 3.0, 2.0))
    assert policy.to_dict() == before
    assert type(policy) is POLICIES.get(name)


@pytest.mark.parametrize(("layer", "asking", "closer"), [(10.0, 0.01, True), (0.01, 10.0, False)])
def test_the_dearer_weighs_more(model, trace, layer, asking, closer):
    found = space_exits(model, trace, "confidence", "max-drop:0.05", performance_hint="latency",
                        clock=Counted(model, layer, asking).clock)  # fmt: skip
    assert [trial.every for trial in found.tried] == [1, 2, 3, 4, 5]
    assert found.result == ee.calibrate(trace, "confidence", "max-drop:0.05", every=found.every)
    best = min(found.tried, key=lambda trial: trial.mean_layers if closer else trial.mean_exits)
    assert next(trial for trial in found.tried if trial.every == found.every) == best
    for trial in found.tried:
        result = ee.calibrate(trace, "confidence", "max-drop:0.05", every=trial.every, folds=0)
        assert (trial.quality, trial.mean_layers) == (result.quality, pytest.approx(result.mean_layers))
        assert trial.seconds == pytest.approx(layer * trial.mean_layers + asking * trial.mean_exits)


@pytest.mark.parametrize("name", ["confidence", "patience"])
def test_a_row_takes_as_many_layers_and_exits_as_expected(model, name, tokenizer, random_texts, random_batch):
    """Counted by hooks while rows are answered one by one."""
    rows = random_texts(60)
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labelled=False, progress=False)
    counted = Counted(model, 1.0, 1.0)
    found = space_exits(model, trace, name, "max-drop:0.3", keep_weak_exits=True, clock=counted.clock)
    for trial in found.tried:
        made = ee.calibrate(trace, name, "max-drop:0.3", every=trial.every, keep_weak_exits=True, folds=0)
        model.set_exit_policy(made)
        counted.parts.clear()
        for row in rows:
            ee.predict(model, [row], tokenizer=tokenizer)
        assert counted.parts["layer"] / len(rows) == pytest.approx(trial.mean_layers)
        assert counted.parts["exit"] / len(rows) == pytest.approx(trial.mean_exits)
    assert len({trial.mean_exits for trial in found.tried}) > 2


def test_pictures_are_made_up_too():
    pictures = new_model("vit")
    trace = learned_trace(300, exits=len(pictures.exit_layers), classes=pictures.num_labels)
    policy = ee.calibrate(trace, "confidence", "max-drop:0.05", folds=0).policy
    for hint, per_row in (("latency", 1), ("throughput", None)):
        costs = measure_step_costs(pictures, policy, hint, Counted(pictures, layer=3.0, asking=2.0).clock)
        assert costs.exit / costs.layer == pytest.approx(2 / 3)
        assert per_row is None or costs.layer >= 3


def test_layers_that_take_no_time_are_an_error(model, trace):
    policy = ee.calibrate(trace, "confidence", "max-drop:0.05", folds=0).policy
    with pytest.raises(UsageError, match=r"in full takes no longer than its first 3 layers .* too busy to measure on"):
        measure_step_costs(model, policy, "latency", Counted(model, layer=0.0, asking=2.0).clock)


def test_spacings_differ_in_their_exits():
    assert spacings(tuple(range(1, 13))) == list(range(1, 12))
    assert spacings((6, 12)) == [6]
    assert spacings((3, 6, 9, 12)) == [3, 6, 9]
    assert spacings((12,)) == []


def test_the_model_is_left_as_it_was(model, trace):
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.9,) * 5))
    before = model.config.to_dict()
    space_exits(model, trace, target="max-drop:0.05", clock=Counted(model, 1.0, 1.0).clock)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("target", [SpeedUp(2), LayerBudget(3), Certified(0.1, 0.9), "speed-up:2"], ids=str)
def test_targets_that_say_nothing_of_quality_and_promises_are_refused(model, trace, target):
    with pytest.raises(UsageError, match="exits are spaced for a target that says how much quality may be lost"):
        space_exits(model, trace, target=target)


def test_what_cannot_be_spaced_is_refused(model, tiny_model, trace):
    with pytest.raises(UnknownNameError, match="performance hint"):
        space_exits(model, trace, performance_hint="speed")
    with pytest.raises(UsageError, match="one exit; expected at least two"):
        space_exits(tiny_model(num_hidden_layers=LAYERS, exit_layers=[LAYERS]), trace)
    with pytest.raises(
        UsageError, match=r"trace has exits after layers \(1, 2, 3, 4\), the model after \(1, 2, 3, 4, 5, 6\)"
    ):
        space_exits(model, learned_trace(100))
    with pytest.raises(UsageError, match="every is what is looked for"):
        space_exits(model, trace, every=2)
    with pytest.raises(CalibrationError, match="No row leaves early for MaxDrop"):
        space_exits(model, trace, options={"muted": tuple(range(LAYERS - 1))})

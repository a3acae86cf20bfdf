"""Every registered policy keeps the laws, in every configuration that matters."""

import json

import numpy as np
import pytest
import torch

from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies import POLICIES, BeemPolicy, ConfidencePolicy, ExitPolicy, scanning
from hf_earlyexit.policies.reward import NUM_WEIGHTS
from hf_earlyexit.problem_types import MULTI_LABEL, PROBLEM_TYPES, REGRESSION
from hf_earlyexit.walking.laws import LAWS, check_exit_policy
from tests.samples import learned_trace, scan

MUTED = {"muted": [0, 2]}
MANY = {"problem_type": MULTI_LABEL}

MEASURED = [
    {"thresholds": [0.9, 0.8, 0.7]},
    {"thresholds": [None, 0.8, None]},
    {"thresholds": [None, 0.5, None], **MUTED},
    {"thresholds": [0.5, 0.5, 0.5], **MANY},
    {"thresholds": [0.5]},
    {"thresholds": [0.0, 0.0], "exit_layers": [2, 4, 12]},
    {"thresholds": [1.0, None], "exit_layers": [2, 4, 12]},
]
BEEM = [
    {"thresholds": [0.5, 1.0, 1.5], "weights": [0.7, 0.8, 0.9, 0.9]},
    {"thresholds": [None, 1.0, None], "weights": [0.7, 0.8, 0.9, 0.9], **MUTED},
    {"thresholds": [0.7, None, 0.7], "weights": [1, 1, 1, 1], "exit_layers": [3, 6, 9, 12]},
    {"thresholds": [0.1, 0.2, 0.2], "weights": [0.0, 0.1, 0.2, 0.3], "reset": "zero"},
    {"thresholds": [0.1, 0.2, 0.3], "weights": [0.1, 0.2, 0.3, 0.4], "vote": "margin"},
    {"thresholds": [1.0, 20.0, 300.0], "weights": [0.1, 0.2, 0.3, 0.4], "vote": "log-odds"},
    {"thresholds": [0.5, 0.5, 0.5], "weights": [1.0, 1.0, 1.0, 1.0], "decay": 0.0},
    {"thresholds": [0.5, 0.9, 1.2], "weights": [0.9, 0.9, 0.9, 0.9], "decay": 0.5, "reset": "zero"},
    {"thresholds": [0.5, 1.0, 1.5], "weights": [0.7, 0.8, 0.9, 0.9], **MANY},
    {"thresholds": [0.5, None, 1.5], "weights": [0.7, 0.8, 0.9, 0.9], "vote": "log-odds", "muted": [1], **MANY},
    {"thresholds": [0.5], "weights": [0.7, 0.8]},
]
LINES = {"slopes": [0.5, 1.0, 1.5, 2.0], "offsets": [[0.1, -0.2, 0.0], [0.0, 1.0, -1.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]}
NETWORK = {"weights": torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(5)).tolist()}
CONFIGURATIONS = {
    "beem": BEEM,
    "beem-a": BEEM,
    "beem-c": BEEM,
    "beem-calibrated": [
        {"thresholds": [0.8, 0.8, 0.8], **LINES},
        {"thresholds": [None, 0.8, None], **LINES, **MUTED},
        {"thresholds": [0.9, None, 0.7], "memory": 0.0, "exit_layers": [3, 6, 9, 12], **LINES},
        {"thresholds": [0.9, 0.8, 0.7], "memory": 0.9, **LINES, "slopes": [-1.0, 0.0, 1e6, 1.0]},
    ],
    "confidence": MEASURED,
    "entropy": MEASURED,
    "gate": [*MEASURED, {"thresholds": [0.5, None], "problem_type": REGRESSION}],
    "margin": MEASURED,
    "patience": [
        {"thresholds": [1, 1, 2]},
        {"thresholds": [None, 1, None]},
        {"thresholds": [None, 1, None, 1], **MUTED},
        {"thresholds": [None, 2, 2], **MANY},
        {"thresholds": [1, 1, 2], "problem_type": REGRESSION, "tolerance": 0.5},
        {"thresholds": [None, 1, 2], "muted": [0], "problem_type": REGRESSION, "tolerance": 2.0},
        {"thresholds": [1]},
    ],
    "reward": [
        {"thresholds": [0.5, 0.5, 0.5], **NETWORK},
        {"thresholds": [None, 0.5, None], **NETWORK, **MUTED},
        {"thresholds": [0.3, None, 0.6], "weights": [50.0] * NUM_WEIGHTS, "exit_layers": [3, 6, 9, 12]},
        {"thresholds": [0.5], "weights": [0.0] * NUM_WEIGHTS},
    ],
    "saturation": [*MEASURED, {"thresholds": [0.5, None], "problem_type": REGRESSION}],
    "static": [
        {"thresholds": [None, 2, None]},
        {"thresholds": [3, 3, 3], "exit_layers": [3, 6, 9, 12]},
        {"thresholds": [None, 2, None], **MUTED},
        {"thresholds": [1], **MANY},
        {"thresholds": [None, 2], "problem_type": REGRESSION},
    ],
}
CASES = [
    pytest.param({"name": name, **fields}, id=f"{name}-{number}")
    for name, configurations in CONFIGURATIONS.items()
    for number, fields in enumerate(configurations)
]


def test_every_registered_policy_has_its_configurations_here():
    assert set(CONFIGURATIONS) == set(POLICIES.names()), "add the new policy's configurations to CONFIGURATIONS above"


def test_every_configuration_table_covers_what_the_policy_offers():
    for name, configurations in CONFIGURATIONS.items():
        served = {fields.get("problem_type", PROBLEM_TYPES[0]) for fields in configurations}
        assert served == POLICIES.get(name).problem_types, f"{name}: try each problem type it serves"
        assert any(fields.get("muted") for fields in configurations), f"{name}: try a muted exit"


@pytest.mark.parametrize("values", CASES)
def test_a_policy_keeps_every_law(values):
    assert check_exit_policy(ExitPolicy.from_dict(values)) == [law.__name__ for law in LAWS]


@pytest.mark.parametrize("values", CASES)
def test_a_policy_is_its_plain_numbers(values):
    policy = ExitPolicy.from_dict(values)
    written = json.loads(json.dumps(policy.to_dict(), allow_nan=False))
    assert written["name"] == policy.name == values["name"]
    for field, value in values.items():
        assert written[field] == value
    assert ExitPolicy.from_dict(written) == policy
    assert hash(ExitPolicy.from_dict(written)) == hash(policy)
    for form in (np.asarray, lambda thresholds: list(map(np.float64, thresholds)), torch.DoubleTensor):
        if None not in policy.thresholds:
            given = ExitPolicy.from_dict({**values, "thresholds": form([*map(float, policy.thresholds)])})
            assert given.to_dict() == written
            assert all(type(threshold) is float for threshold in given.thresholds)


@pytest.mark.parametrize("values", CASES)
def test_muted_exits_have_no_score_and_serving_does_not_want_them(values):
    policy = ExitPolicy.from_dict(values)
    classes = 1 if policy.problem_type == REGRESSION else 3
    logits = torch.randn(16, policy.num_exits, classes, generator=torch.Generator().manual_seed(0))
    scores = scan(policy, logits).scores
    for index in range(policy.num_exits):
        muted = index in policy.muted
        assert bool((scores[:, index] == -torch.inf).all()) == muted
        if muted:
            assert not policy.wants(index)
    assert policy.wants(policy.num_exits - 1)


@pytest.mark.parametrize("values", CASES)
def test_what_a_muted_exit_says_changes_nothing(values):
    policy = ExitPolicy.from_dict(values)
    if not policy.muted:
        assert all(policy.wants(index) for index in range(policy.num_exits)) == (
            policy.uses_history or None not in policy.thresholds
        )
        return
    classes = 1 if policy.problem_type == REGRESSION else 3
    logits = torch.randn(64, policy.num_exits, classes, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[:, list(policy.muted)] *= -7
    assert torch.equal(scan(policy, logits).scores, scan(policy, other).scores)


@pytest.mark.parametrize("values", CASES)
def test_no_score_is_above_the_highest_threshold(values):
    policy = ExitPolicy.from_dict(values)
    classes = 1 if policy.problem_type == REGRESSION else 3
    same = torch.full((1, policy.num_exits, classes), -1e4)
    same[..., 0] = 1e4  # every exit is certain of the same answer
    scores = scan(policy, same).scores
    assert float(scores.max()) <= policy.highest_threshold
    assert float(scores[:, -1]) > 0


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_every_score_that_was_seen_can_be_a_threshold(name):
    cls = POLICIES.get(name)
    weights = {"weights": (0.1, 0.2, 0.0)} if issubclass(cls, BeemPolicy) else {}
    if name == "reward":
        weights = {"weights": tuple(NETWORK["weights"])}
    if name == "beem-calibrated":
        weights = {"slopes": (1.0, 1.0, 1.0), "offsets": ((0.0, 0.0),) * 3}
    certain = torch.tensor([[1e4, -1e4]]).expand(1, 3, 2)
    policy = cls(thresholds=(None, None), **weights)
    for score in scan(policy, certain).scores[0].tolist():
        if score >= policy.lowest_threshold:
            assert policy.with_thresholds((None, score)).thresholds == (None, score)


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_policy_made_from_a_trace_fits_it_and_is_closed(name, problem_type):
    cls = POLICIES.get(name)
    if problem_type not in cls.problem_types:
        with pytest.raises(PolicyError, match="cannot serve"):
            cls.from_trace(learned_trace(problem_type=problem_type), **_own_numbers(name, problem_type))
        return
    policy = cls.from_trace(learned_trace(problem_type=problem_type), **_own_numbers(name, problem_type))
    assert policy.thresholds == (None, None, None)
    assert (policy.exit_layers, policy.problem_type) == ((1, 2, 3, 4), problem_type)


def _own_numbers(name, problem_type):
    if name == "beem":
        return {"weights": (0.1, 0.2, 0.3, 0.4)}
    return {"tolerance": 0.1} if name == "patience" and problem_type == REGRESSION else {}


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_the_answer_is_that_of_the_exit_itself(name, monkeypatch):
    policy = POLICIES.get(name).from_trace(learned_trace(), **_own_numbers(name, None))
    trace = learned_trace(seed=1)
    whole = policy.scan(trace)
    assert whole.answers is trace.logits  # not a copy of it
    monkeypatch.setattr(scanning, "SCANNED", 7)
    assert torch.equal(policy.scan(trace).scores, whole.scores)


# --- policies that cannot work -------------------------------------------------------------------------------------


def refused(name, fields, field, words=None):
    with pytest.raises(PolicyError, match=words) as caught:
        ExitPolicy.from_dict({"name": name, **fields})
    assert caught.value.field == field
    return str(caught.value)


BAD_NUMBERS = [float("nan"), float("inf"), float("-inf"), -0.1, True, False, "0.5", [0.5]]


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_a_threshold_that_is_no_finite_number_in_range_is_refused(name, bad):
    good = CONFIGURATIONS[name][0]
    thresholds = [good["thresholds"][0], bad, *good["thresholds"][2:]]
    refused(name, {**good, "thresholds": thresholds}, "thresholds[1]", "finite number from")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("confidence", 1.01),
        ("entropy", 1.01),
        ("margin", 1.01),
        ("gate", 1.01),
        ("patience", 0),
        ("patience", 4),
        ("static", 0),
        ("static", 5),
    ]
    + [(name, 3.4) for name in ("beem", "beem-a", "beem-c")],  # the weights add up to 3.3
)
def test_a_threshold_that_no_score_can_reach_is_refused_with_the_range(name, bad):
    good = CONFIGURATIONS[name][0]
    message = refused(name, {**good, "thresholds": [bad, *good["thresholds"][1:]]}, "thresholds[0]", "finite number from")
    assert repr(bad) in message


@pytest.mark.parametrize("name", ["patience", "static"])
def test_a_threshold_between_two_counts_is_refused(name):
    refused(name, {"thresholds": [1.5, 2, 2]}, "thresholds[0]", "whole number")


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
@pytest.mark.parametrize("bad", [0.5, "0.5", None, {"0": 0.5}], ids=repr)
def test_thresholds_come_as_a_list(name, bad):
    with pytest.raises(PolicyError):
        ExitPolicy.from_dict({"name": name, **CONFIGURATIONS[name][0], "thresholds": bad})


@pytest.mark.parametrize("count", [0, 2, 4])
def test_the_wrong_number_of_thresholds_for_the_exits_is_refused(count):
    fields = {"thresholds": [0.5] * count, "exit_layers": [3, 6, 9, 12]}
    refused("confidence", fields, "thresholds", f"{count} entries for 4 exits; expected 3")


@pytest.mark.parametrize("name", ["beem", "beem-a", "beem-c"])
@pytest.mark.parametrize("weights", [[0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [], 0.3, None, "abc"], ids=repr)
def test_the_wrong_number_of_weights_is_refused(name, weights):
    refused(name, {"thresholds": [0.1, 0.2], "weights": weights}, "weights", "expected 3 numbers")


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_a_weight_that_is_no_finite_number_from_zero_is_refused(bad):
    refused("beem", {"thresholds": [0.1, 0.1], "weights": [0.1, bad, 0.3]}, "weights[1]", "finite number from")


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, 1.1], ids=repr)
def test_a_decay_outside_zero_to_one_is_refused(bad):
    refused("beem", {"thresholds": [0.1], "weights": [0.1, 0.2], "decay": bad}, "decay", "from 0 to 1")


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("slopes", [1.0]),
        ("slopes", 1.0),
        ("offsets", [[0.0, 0.0]]),
        ("offsets", [0.0, 0.0]),
        ("memory", 1.1),
        ("memory", 1.0),
    ]
    + [("memory", bad) for bad in BAD_NUMBERS]
    + [("slopes", [1.0, bad]) for bad in BAD_NUMBERS if bad != -0.1],
    ids=repr,
)
def test_calibrated_lines_are_one_per_exit_with_finite_numbers(field, bad):
    good = {"name": "beem-calibrated", "thresholds": [0.5], "slopes": [1.0, 1.0], "offsets": [[0.0, 0.0], [0.0, 0.0]]}
    assert ExitPolicy.from_dict(good).num_exits == 2
    with pytest.raises(PolicyError, match=field):
        ExitPolicy.from_dict({**good, field: bad})


@pytest.mark.parametrize("bad", [0.1, [0.1], [0.0] * (NUM_WEIGHTS + 1)], ids=["number", "short", "long"])
def test_a_network_of_another_size_is_refused(bad):
    refused("reward", {"thresholds": [0.5], "weights": bad}, "weights", f"expected {NUM_WEIGHTS} numbers")


@pytest.mark.parametrize("bad", [bad for bad in BAD_NUMBERS if bad != -0.1], ids=repr)
def test_a_network_without_numbers_is_refused(bad):
    refused("reward", {"thresholds": [0.5], "weights": [0.0] * (NUM_WEIGHTS - 1) + [bad]}, f"weights[{NUM_WEIGHTS - 1}]")


@pytest.mark.parametrize(("field", "bad"), [("vote", "max"), ("vote", None), ("reset", "one"), ("reset", 0)])
def test_a_choice_that_is_none_is_refused_with_the_list(field, bad):
    choices = {"vote": "probability, margin, log-odds", "reset": "self, zero"}[field]
    refused("beem", {"thresholds": [0.1], "weights": [0.1, 0.2], field: bad}, field, choices)


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_a_tolerance_that_is_no_finite_number_from_zero_is_refused(bad):
    refused("patience", {"thresholds": [1], "problem_type": REGRESSION, "tolerance": bad}, "tolerance")


def test_patience_on_values_needs_a_tolerance():
    refused("patience", {"thresholds": [1], "problem_type": REGRESSION}, "tolerance", "above 0")


@pytest.mark.parametrize("muted", [[3], [-1], [True], [1.0], ["0"], [0, 0], 0], ids=repr)
def test_muted_exits_are_indices_of_early_exits_each_once(muted):
    refused("confidence", {"thresholds": [None, None, 0.5], "muted": muted}, "muted")


def test_a_muted_exit_cannot_be_open():
    refused("confidence", {"thresholds": [0.5, 0.5], "muted": [1]}, "muted", "threshold null")


@pytest.mark.parametrize(
    "layers", [[1, 2], [1, 2, 3, 4], [3, 2, 1], [1, 1, 2], [0, 1, 2], [1, 2, float("nan")], 3], ids=repr
)
def test_exit_layers_ascend_from_one_and_are_as_many_as_the_exits(layers):
    with pytest.raises(PolicyError) as caught:
        ExitPolicy.from_dict({"name": "confidence", "thresholds": [0.5, 0.5], "exit_layers": layers})
    assert caught.value.field in ("exit_layers", "thresholds")


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_an_unknown_field_is_refused_with_those_there_are(name):
    message = refused(name, {**CONFIGURATIONS[name][0], "treshold": 0.5}, "treshold", "has no field treshold")
    assert "thresholds" in message


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_missing_thresholds_are_missed_by_name(name):
    fields = {k: v for k, v in CONFIGURATIONS[name][0].items() if k != "thresholds"}
    refused(name, fields, "thresholds", "needs thresholds")


@pytest.mark.parametrize("values", [None, "beem", [], {}, {"thresholds": [0.5]}], ids=repr)
def test_what_is_no_policy_at_all_is_refused(values):
    with pytest.raises(PolicyError, match="dict with a 'name'") as caught:
        ExitPolicy.from_dict(values)
    assert caught.value.field == "exit_policy"


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_an_unknown_problem_type_is_refused(name):
    refused(name, {**CONFIGURATIONS[name][0], "problem_type": "ranking"}, "problem_type", "expected one of single_label")


@pytest.mark.parametrize("name", sorted(n for n in CONFIGURATIONS if REGRESSION not in POLICIES.get(n).problem_types))
def test_a_problem_type_the_rule_cannot_serve_is_refused_naming_who_can(name):
    message = refused(
        name, {**CONFIGURATIONS[name][0], "problem_type": REGRESSION}, "problem_type", f"The {name} policy cannot"
    )
    assert "these can: gate, patience, saturation, static." in message


def test_a_policy_cannot_be_changed_behind_its_checks():
    policy = ConfidencePolicy(thresholds=(0.5,))
    with pytest.raises(AttributeError):
        policy.thresholds = (float("nan"),)
    with pytest.raises(PolicyError):
        policy.with_thresholds(float("nan"))


def test_one_number_serves_every_exit_that_is_not_muted():
    policy = ConfidencePolicy(thresholds=(None, 0.2, 0.3), muted=(0,))
    assert policy.with_thresholds(0.7).thresholds == (None, 0.7, 0.7)
    assert policy.with_thresholds(None).thresholds == (None, None, None)
    assert policy.with_thresholds((None, None, 0.1)).thresholds == (None, None, 0.1)
    assert policy.thresholds == (None, 0.2, 0.3)

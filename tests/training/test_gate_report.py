"""Gates that no longer tell rows apart show in the log, and are warned of once it has happened twice."""

from dataclasses import replace

import pytest
import torch

from hf_earlyexit.problem_types import MULTI_LABEL
from hf_earlyexit.training.gate_report import gate_metrics, warn_of_trouble
from tests.samples import learned_trace


def told(gates, times=2, **fields):
    """Metrics of these gates, and what is warned of after so many evaluations."""
    trace = replace(learned_trace(200, **fields), scalars={"gate": gates})
    metrics = gate_metrics(trace)
    return metrics, warn_of_trouble([metrics] * times)


def mixed(scale):
    """Gates that send rows everywhere, as certain as the scale is large."""
    return scale * torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).sign()


def test_gates_in_good_health_are_not_warned_of():
    metrics, warnings = told(mixed(2.0))
    assert (metrics["gate_certain"], metrics["gate_stuck_classes"], warnings) == (0.0, 0.0, [])


@pytest.mark.parametrize(("gate", "layer"), [(4.0, 1), (-4.0, 4)])
def test_a_layer_that_takes_all_rows_is_warned_of(gate, layer):
    _, warnings = told(torch.full((200, 3), gate))
    assert len(warnings) == 1
    assert f"out after layer {layer}, twice in a row" in warnings[0]
    assert told(torch.full((200, 3), gate), times=1)[1] == []


def test_saturated_gates_are_warned_of():
    metrics, warnings = told(mixed(9.0))
    assert metrics["gate_certain"] == 1.0
    assert len(warnings) == 1
    assert "they are saturated" in warnings[0]
    half = mixed(9.0) * (torch.arange(200) < 100)[:, None]
    assert told(half)[0]["gate_certain"] == 0.5


def test_a_class_that_never_leaves_early_is_warned_of():
    labels = learned_trace(200).labels
    gates = torch.where((labels == 1)[:, None], -torch.ones(200, 3), mixed(2.0))
    metrics, warnings = told(gates)
    assert metrics["gate_stuck_classes"] == 1.0
    assert len(warnings) == 1
    assert "No row of 1 class leaves early" in warnings[0]


def test_classes_are_not_counted_where_rows_have_many_labels():
    metrics, warnings = told(mixed(2.0), problem_type=MULTI_LABEL)
    assert "gate_stuck_classes" not in metrics
    assert warnings == []


def test_what_has_passed_is_not_warned_of():
    bad, good = (gate_metrics(replace(learned_trace(200), scalars={"gate": gates})) for gates in (mixed(9.0), mixed(2.0)))
    assert warn_of_trouble([bad, bad, good]) == []
    assert warn_of_trouble([bad, {"loss": 1.0}, bad]) != []

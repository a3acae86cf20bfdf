"""The benchmark of exits learned by reward: which setting it reports, what a control is, and how it counts."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.policies import POLICIES
from tests.samples import learned_trace
from tests.training import consistent_script as script

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def part(monkeypatch):
    """`part("consistentee")`: a script of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_every_swept_setting_is_what_the_policy_really_does(part):
    held, report = learned_trace(300), learned_trace(200, seed=1)
    policy = POLICIES.get("confidence").from_trace(held)
    settings = part("consistentee").of_policy(policy, held, report)
    levels = np.sort(np.unique(policy.scan(held).scores[:, :-1].numpy()))
    for threshold in levels[:: len(levels) // 5]:
        done = ee.replay(policy.with_thresholds(float(threshold)), held)
        nearest = np.abs(settings.held[:, 0] - done.mean_layers).argmin()
        assert settings.held[nearest] == pytest.approx([done.mean_layers, done.quality, done.standard_error], abs=1e-6)
    assert settings.report[-1] == pytest.approx([4, float(report.quality[:, -1].mean()), 0], abs=1e-6)


def test_the_reserve_takes_back_settings_that_are_good_by_luck(part):
    held = np.array([[2, 0.90, 0.02], [3, 0.93, 0.02], [4, 0.90, 0.0]])  # layers, accuracy, standard error
    report = held - [0, 0.05, 0]
    settings = part("consistentee").Settings(held, report)
    assert [settings.no_loss(sigmas)[0] for sigmas in (0, 1, 2)] == [2, 3, 4]
    assert settings.no_loss(1)[1] == pytest.approx(0.88)


def test_what_leaves_at_some_exit_is_counted_row_by_row(part):
    trace = learned_trace(50)
    taken = torch.arange(50) % 4
    right = trace.quality[torch.arange(50), taken].double()
    error = (right - trace.quality[:, -1]).std(correction=0) / 50**0.5
    expected = [float((taken + 1).double().mean()), float(right.mean()), float(error)]
    assert part("consistentee").outcome(trace, taken) == pytest.approx(expected)


def method(difference, others, where=("start",)):
    point = {"mean_layers": 6.0, "layer_speed_up": 2.0, "difference": difference}
    return {reserve: point | {"others_there": dict.fromkeys(where, others)} for reserve in ("none", "one")} | {"area": None}


def test_a_win_is_over_every_rule_and_the_controls_rules_count_apart(part):
    page = part("consistentee_page")
    weak, strong = dict.fromkeys(page.OTHERS, 0.0), {**dict.fromkeys(page.OTHERS, 0.0), "beem-a": 0.02}
    seen = method(0.01, weak, ("start", "control"))
    for reserve in ("none", "one"):
        seen[reserve]["others_there"]["control"] = strong
    runs = {"rte-0": {"methods": {"new": seen}}, "mrpc-0": {"methods": {"new": method(0.01, strong)}}}
    assert page.wins({"runs": runs}, ["rte", "mrpc"], "new", "start").split(" | ")[1:] == ["1 of 2", "1 of 2 |"]
    assert page.wins({"runs": runs}, ["rte", "mrpc"], "new", "control").split(" | ")[1:] == ["0 of 1", "0 of 1 |"]


def test_a_control_is_trained_as_long_and_as_fast_on_the_same_rows_in_the_same_order(part, tmp_path, monkeypatch):
    chosen, seen = part("train_chosen"), []

    def noted(trainer, **kwargs):
        settings = ("seed", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size")
        gates = [p for name, p in trainer.model.named_parameters() if name.startswith("exit_gates.")]
        rows = trainer.train_dataset["input_ids"][:]
        seen.append(([getattr(trainer.args, name) for name in settings], rows, any(p.requires_grad for p in gates)))

    monkeypatch.setattr(ee.EarlyExitTrainer, "train", noted)
    rows = script.make_rows(48).rename_column(script.make_args(tmp_path).id_column, "row")
    encoded = {"train": rows, "held-back": rows}
    last = {"chosen_epochs": 1.5, "chosen_learning_rate": 3e-4}
    for run in (chosen.train_by_reward, chosen.train_all_exits):
        args = script.make_args(tmp_path / run.__name__, exits_trained=True, rounds=2, id_column="row", **last)
        run(script.make_model(), args, encoded, None)
    by_reward, control = seen[:2], seen[2:]
    assert len(control) == 2
    assert by_reward == control
    assert control[0][0][0] != control[1][0][0]  # another order in each turn

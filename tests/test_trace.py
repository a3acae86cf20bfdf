import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_earlyexit.errors import CheckpointError, DataError, UnknownNameError
from hf_earlyexit.problem_types import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from hf_earlyexit.trace import FORMAT, ExitTrace
from tests.samples import learned_trace, sst2_trace


def trace(**changes) -> ExitTrace:
    fields = {"logits": torch.zeros(5, 3, 2), "labels": torch.tensor([0, 1, 0, 1, 1]), "exit_layers": (2, 4, 6)}
    return ExitTrace(**{**fields, **changes})


def test_a_trace_knows_its_rows_exits_and_costs():
    assert (trace().num_rows, trace().num_exits) == (5, 3)
    assert trace().costs == (2.0, 4.0, 6.0)
    assert trace(cost=(2.5, 4.5, 6.5)).costs == (2.5, 4.5, 6.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logits", torch.zeros(5, 3)),
        ("logits", torch.zeros(5, 4, 2)),
        ("labels", torch.zeros(4, dtype=torch.long)),
        ("exit_layers", (2, 4)),
    ],
    ids=["no-classes", "one-exit-more", "one-label-less", "one-layer-less"],
)
def test_shapes_that_do_not_fit_each_other_are_refused(field, value):
    with pytest.raises(DataError, match="expected") as caught:
        trace(**{field: value})
    assert caught.value.field in ("logits", "labels", "exit_layers")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exit_layers", (6, 4, 2)),
        ("exit_layers", (2, 2, 6)),
        ("exit_layers", (0, 4, 6)),
        ("cost", (1.0, 2.0)),
        ("cost", (1.0, float("nan"), 3.0)),
        ("exit_layers", 6),
        ("logits", np.zeros((5, 3, 2))),
        ("labels", [0] * 5),
        ("scalars", {"gate": [[0.0] * 2] * 5}),
        ("problem_type", "clasification"),
    ],
)
def test_fields_that_cannot_be_true_are_refused_by_name(field, value):
    with pytest.raises(DataError) as caught:
        trace(**{field: value})
    assert caught.value.field == ("gate" if field == "scalars" else field)


@pytest.mark.parametrize(
    ("name", "values"),
    [("gate", torch.zeros(5, 3)), ("gate", torch.zeros(4, 2)), ("similarity", torch.zeros(5, 2)), ("gate", torch.zeros(5))],
)
def test_signals_of_another_shape_are_refused_by_name(name, values):
    with pytest.raises(DataError, match=f"{name} has shape") as caught:
        trace(scalars={name: values})
    assert caught.value.field == name


def test_signals_that_nobody_knows_are_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'similarity'"):
        trace(scalars={"similarities": torch.zeros(5, 3)})


@pytest.mark.parametrize("labels", [torch.zeros(5, 3), torch.zeros(5)], ids=["one-too-many", "not-one-per-label"])
def test_many_labels_come_as_one_column_per_class(labels):
    with pytest.raises(DataError) as caught:
        trace(labels=labels, problem_type=MULTI_LABEL)
    assert caught.value.field == "labels"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_that_is_not_finite_is_refused_with_its_row(bad):
    logits = torch.zeros(5, 3, 2)
    logits[3, 1, 0] = bad
    with pytest.raises(DataError, match="Row 3") as caught:
        trace(logits=logits)
    assert caught.value.field == "logits"


def test_a_value_to_predict_that_is_not_finite_is_refused():
    with pytest.raises(DataError) as caught:
        trace(
            logits=torch.zeros(5, 3, 1),
            labels=torch.tensor([0.0, 1.0, float("nan"), 2.0, 3.0]),
            problem_type=REGRESSION,
        )
    assert caught.value.field == "labels"


@pytest.mark.parametrize(
    ("label", "words"), [(2, "from 0 to 2; expected 0 to 1"), (-1, "from -1 to 1"), (-100, "from -100")]
)
def test_labels_out_of_range_are_refused_with_the_range(label, words):
    with pytest.raises(DataError, match=words) as caught:
        trace(labels=torch.tensor([0, 1, 0, 1, label]))
    assert caught.value.field == "labels"


def test_an_empty_trace_is_a_trace():
    assert trace(logits=torch.zeros(0, 3, 2), labels=torch.zeros(0, dtype=torch.long)).num_rows == 0


def test_signals_are_the_columns_and_the_last_exit_has_no_gate():
    gates = torch.arange(10.0).reshape(5, 2)
    logits = torch.arange(30.0).reshape(5, 3, 2)
    full = trace(logits=logits, scalars={"gate": gates})
    assert torch.equal(full.signal(1).logits, logits[:, 1])
    assert torch.equal(full.signal(1).scalars["gate"], gates[:, 1])
    assert torch.equal(full.signal(2).logits, logits[:, 2])
    assert full.signal(2).scalars == {}
    assert trace().signal(0).scalars == {}


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_quality_is_one_number_per_row_and_exit(problem_type):
    sample = learned_trace(20, exits=4, problem_type=problem_type)
    assert sample.quality.shape == (20, 4)
    assert sample.quality[:, -1].mean() > sample.quality[:, 0].mean()


def test_select_takes_rows_in_the_given_order_with_all_that_belongs_to_them():
    scalars = {"gate": torch.arange(18.0).reshape(6, 3)}
    full = learned_trace(6, scalars=scalars, fingerprint="abc", meta={"a": 1}, split="dev")
    part = full.select([4, 0, 4])
    assert torch.equal(part.logits, full.logits[[4, 0, 4]])
    assert torch.equal(part.labels, full.labels[[4, 0, 4]])
    assert torch.equal(part.scalars["gate"], full.scalars["gate"][[4, 0, 4]])
    assert (part.exit_layers, part.fingerprint, part.meta, part.split) == (full.exit_layers, "abc", {"a": 1}, "dev")


def test_select_takes_a_mask_as_a_mask():
    full = learned_trace(6)
    mask = torch.tensor([False, False, True, False, False, True])
    assert torch.equal(full.select(mask).logits, full.logits[[2, 5]])


def test_select_of_nothing_is_empty():
    assert learned_trace(6).select([]).num_rows == 0


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_saving_and_loading_is_exact(tmp_path, problem_type, gated):
    scalars = {"gate": torch.randn(8, 3, generator=torch.Generator().manual_seed(1))} if gated else {}
    meta = {"dtype": "bfloat16", "versions": {"torch": "2"}}
    full = learned_trace(
        8, problem_type=problem_type, scalars=scalars, cost=(1.1, 2.1, 3.1, 4.3), split="dev", fingerprint="f00", meta=meta
    )
    full.save(tmp_path / "trace.safetensors")
    back = ExitTrace.load(tmp_path / "trace.safetensors")
    for name, value in vars(full).items():
        found = getattr(back, name)
        if name == "scalars":
            assert found.keys() == value.keys()
            assert all(torch.equal(found[signal], values) for signal, values in value.items())
        elif isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype
            assert torch.equal(found, value), name
        else:
            assert found == value, name
            assert type(found) is type(value), name


def test_a_selection_can_be_saved(tmp_path):
    learned_trace(8).select([1, 3]).save(tmp_path / "trace.safetensors")
    assert ExitTrace.load(tmp_path / "trace.safetensors").num_rows == 2


def test_a_transposed_trace_can_be_saved(tmp_path):
    logits = torch.arange(12.0).reshape(2, 3, 2).permute(1, 0, 2)  # [3, 2, 2], not contiguous
    ExitTrace(logits=logits, labels=torch.tensor([0, 1, 0]), exit_layers=(1, 2)).save(tmp_path / "trace.safetensors")
    assert torch.equal(ExitTrace.load(tmp_path / "trace.safetensors").logits, logits)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_damaged_file_is_refused_with_its_path(tmp_path, keep):
    path = tmp_path / "trace.safetensors"
    learned_trace(8).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        ExitTrace.load(path)
    assert caught.value.path == str(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        ExitTrace.load(tmp_path / "nowhere.safetensors")
    assert caught.value.path == str(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "hf_earlyexit.trace/9"}])
def test_a_foreign_safetensors_file_is_refused_with_its_path(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="not an exit trace") as caught:
        ExitTrace.load(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize(
    "metadata", [{}, {"values": "{"}, {"values": "{}"}, {"values": json.dumps({"exit_layers": [1], "cost": None})}]
)
def test_a_trace_file_that_lacks_what_a_trace_needs_is_refused_with_its_path(tmp_path, metadata):
    path = tmp_path / "half.safetensors"
    save_file({"labels": torch.zeros(2, dtype=torch.long)}, path, metadata={"format": FORMAT, **metadata})
    with pytest.raises(CheckpointError) as caught:
        ExitTrace.load(path)
    assert caught.value.path == str(path)


def test_an_exit_that_always_answers_the_same_is_dead_and_one_that_knows_is_not():
    labels = torch.arange(200) % 2
    knows = torch.nn.functional.one_hot(labels, 2).float()
    always = torch.tensor([1.0, 0.0]).expand(200, 2)
    full = ExitTrace(logits=torch.stack([always, knows, always, knows], 1), labels=labels, exit_layers=(1, 2, 3, 4))
    assert full.dead_exits() == (0, 2)


def test_the_last_exit_is_never_called_dead():
    labels = torch.arange(200) % 2
    always = torch.tensor([1.0, 0.0]).expand(200, 1, 2)
    assert ExitTrace(logits=always, labels=labels, exit_layers=(4,)).dead_exits() == ()


def test_an_exit_a_hair_above_chance_is_dead_until_it_is_above_the_noise():
    labels = torch.arange(100) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    wrong = right.flip(-1)
    half = torch.cat([right[:52], wrong[52:]])  # accuracy .52, standard error .05
    most = torch.cat([right[:70], wrong[70:]])  # accuracy .70, standard error .046
    full = ExitTrace(logits=torch.stack([half, most, right], 1), labels=labels, exit_layers=(1, 2, 3))
    assert full.dead_exits() == (0,)
    assert full.dead_exits(sigmas=0.0) == ()
    assert full.dead_exits(sigmas=10.0) == (0, 1)


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
def test_exits_that_know_nothing_are_dead_for_every_problem_type(problem_type):
    full = learned_trace(300, problem_type=problem_type)
    logits = full.logits.clone()
    logits[:, 1] = -1.0 if problem_type == MULTI_LABEL else full.labels.mean()
    blind = ExitTrace(logits=logits, labels=full.labels, exit_layers=full.exit_layers, problem_type=problem_type)
    assert 1 in blind.dead_exits()
    assert 2 not in blind.dead_exits()


def test_on_the_real_first_token_trace_exits_1_to_6_are_dead(data_path):
    assert sst2_trace(data_path, "first-token").dead_exits() == (0, 1, 2, 3, 4, 5)


def test_on_the_real_mean_pooled_trace_no_exit_is_dead(data_path):
    full = sst2_trace(data_path, "mean-pooled")
    assert full.dead_exits() == ()
    assert full.problem_type == SINGLE_LABEL
    assert full.quality[:, -1].mean() > 0.9


@pytest.mark.parametrize("name", ["gate", "similarity"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_signals_beside_the_logits_are_finite(name, value):
    exits = {"gate": 3, "similarity": 4}[name]
    values = torch.rand(6, exits)
    values[3:, 1] = value
    with pytest.raises(DataError, match=f"Row 3 has a value in {name} that is not finite") as caught:
        trace(
            logits=torch.zeros(6, 4, 2),
            labels=torch.zeros(6, dtype=torch.long),
            exit_layers=(1, 2, 3, 4),
            scalars={name: values},
        )
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cost", (3.0, 2.0, 1.0, 4.0)),
        ("cost", (1.0, 1.0, 2.0, 3.0)),
        ("cost", (-1.0, 1.0, 2.0, 3.0)),
        ("cost", (0.0, 1.0, 2.0, 3.0)),
        ("cost", (1.0, 2.0, 3.0, 10**400)),
        ("cost", (1.0, 2.0, 3.0, "4")),
        ("cost", {"a": 1}),
        ("exit_layers", (1, 2, 3, 10**8)),
        ("exit_layers", (1, 2, 3, 10**400)),
        ("exit_layers", (1.0, 2.0, 3.0, 4.0)),
        ("exit_layers", ("1", "2", "3", "4")),
        ("split", None),
        ("fingerprint", 3),
        ("meta", []),
        ("labels", torch.zeros(6)),
        ("labels", torch.zeros(6, dtype=torch.bool)),
        ("labels", torch.zeros(6, 1, dtype=torch.long)),
        ("labels", torch.tensor(0)),
        ("logits", torch.zeros(6, 4, 2, dtype=torch.long)),
    ],
    ids=str,
)
def test_values_of_a_wrong_type_or_size_are_refused_by_name(field, value):
    right = {"logits": torch.zeros(6, 4, 2), "labels": torch.zeros(6, dtype=torch.long), "exit_layers": (1, 2, 3, 4)}
    trace(**right)
    with pytest.raises(DataError) as caught:
        trace(**{**right, field: value})
    assert caught.value.field == field


def test_a_trace_that_was_changed_since_it_was_collected_is_refused(tmp_path):
    path = tmp_path / "held-back.safetensors"
    trace().save(path)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="changed since it was written") as caught:
        ExitTrace.load(path)
    assert caught.value.path == str(path)

"""The hardness table belongs to rows by their ids, is saved whole, and refuses other rows."""

import pytest
import torch
from safetensors.torch import save_file

from hf_earlyexit.errors import CheckpointError, DataError, UnknownNameError
from hf_earlyexit.training.hardness import HardnessTable
from tests.samples import learned_trace


@pytest.fixture
def table():
    return HardnessTable.measured(learned_trace(20), [f"row-{number}" for number in range(20)])


def test_hardness_follows_the_id_in_any_order(table):
    order = torch.randperm(20).tolist()
    shuffled = table.of([table.ids[place] for place in order])
    assert torch.equal(shuffled, table.layers[order])
    assert table.of([]).shape == (0,)


@pytest.mark.parametrize("ids", [list(range(3)), ["a", "b", "c"], [7, "7", -1]], ids=repr)
def test_a_table_comes_back_as_it_was(tmp_path, ids):
    table = HardnessTable.measured(learned_trace(3), ids, "loss")
    table.save(tmp_path / "hardness.safetensors")
    again = HardnessTable.load(tmp_path / "hardness.safetensors")
    assert (again.ids, again.num_layers, again.measure) == (tuple(ids), 4, "loss")
    assert torch.equal(again.layers, table.layers)


def test_foreign_ids_are_refused_by_name(table):
    with pytest.raises(DataError, match="1 of 2 rows are not in the hardness table, first id 'row-99'") as caught:
        table.of(["row-1", "row-99"])
    assert caught.value.value == "row-99"


def test_doubled_ids_are_refused_by_name(table):
    with pytest.raises(DataError, match="id 'row-3' comes twice in the rows"):
        table.of(["row-3", "row-4", "row-3"])
    with pytest.raises(DataError, match="id 5 comes twice in the hardness table"):
        HardnessTable(ids=(5, 6, 5), layers=torch.zeros(3), num_layers=4)


def test_missing_ids_are_refused_by_name(table):
    table.require_exactly(list(reversed(table.ids)))
    with pytest.raises(DataError, match="holds 1 rows that are missing from the data, first id 'row-19'"):
        table.require_exactly(table.ids[:-1])


@pytest.mark.parametrize("bad", [None, 1.5, True, (1,)], ids=repr)
def test_ids_are_whole_numbers_or_texts(bad):
    with pytest.raises(DataError, match="expected a whole number or a text"):
        HardnessTable(ids=(1, bad), layers=torch.zeros(2), num_layers=4)


@pytest.mark.parametrize("bad", [-0.1, 4.1, float("nan"), float("inf")])
def test_hardness_out_of_range_is_refused(bad):
    with pytest.raises(DataError, match="row 'b' is"):
        HardnessTable(ids=("a", "b"), layers=torch.tensor([1.0, bad]), num_layers=4)


def test_one_hardness_a_row():
    with pytest.raises(DataError, match="for 2 ids; expected one a row"):
        HardnessTable(ids=(1, 2), layers=torch.zeros(3), num_layers=4)


def test_an_unknown_measure_comes_with_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"Unknown hardness 'memorised'\. Did you mean 'memorized'"):
        HardnessTable.measured(learned_trace(2), [0, 1], "memorised")


def test_tables_of_rows_measured_apart_are_joined():
    first, second = (HardnessTable.measured(learned_trace(5, seed=s), range(5 * s, 5 * s + 5)) for s in (0, 1))
    both = HardnessTable.joined([first, second])
    assert both.ids == tuple(range(10))
    assert torch.equal(both.of([7, 2]), torch.stack([second.layers[2], first.layers[2]]))
    with pytest.raises(DataError, match="comes twice"):
        HardnessTable.joined([first, first])
    with pytest.raises(DataError, match="different kinds"):
        HardnessTable.joined([first, HardnessTable.measured(learned_trace(5), range(5, 10), "none")])


def test_the_histogram_tells_the_share_of_each_layer():
    table = HardnessTable(ids=(1, 2, 3, 4), layers=torch.tensor([1.0, 1.0, 4.0, 2.5]), num_layers=4)
    assert table.histogram() == {0: 0.0, 1: 0.5, 2: 0.0, 3: 0.25, 4: 0.25}


def test_what_is_no_table_is_refused_with_its_path(tmp_path):
    torn, other = tmp_path / "torn.safetensors", tmp_path / "other.safetensors"
    HardnessTable(ids=(1,), layers=torch.ones(1), num_layers=4).save(torn)
    torn.write_bytes(torn.read_bytes()[:-3])
    save_file({"layers": torch.ones(1)}, other)
    for path in (torn, other, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="is no hardness table") as caught:
            HardnessTable.load(path)
        assert caught.value.path == str(path)


@pytest.mark.parametrize("layers", [10**8, 10**400, 0, -1, 1.5, "4", None, True])
def test_a_number_of_layers_that_no_model_has_is_refused_at_once(layers):
    with pytest.raises(DataError, match="num_layers is") as caught:
        HardnessTable(ids=(1, 2), layers=torch.ones(2), num_layers=layers)
    assert caught.value.field == "num_layers"


@pytest.mark.parametrize("ids", ["ab", {"a": 1, "b": 2}, 3, None])
def test_ids_come_as_a_list(ids):
    with pytest.raises(DataError, match="ids of the hardness table are") as caught:
        HardnessTable(ids=ids, layers=torch.ones(2), num_layers=4)
    assert caught.value.field == "ids"


def test_a_table_that_was_changed_since_it_was_measured_is_refused(table, tmp_path):
    path = tmp_path / "hardness.safetensors"
    table.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="changed since it was written") as caught:
        HardnessTable.load(path)
    assert caught.value.path == str(path)

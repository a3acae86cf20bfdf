"""What every exported family keeps, texts and pictures alike: rows leave where calibration said, in both forms."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import IMAGE
from hf_earlyexit.onnx.classifier import OnnxClassifier
from hf_earlyexit.onnx.export import one_file
from hf_earlyexit.onnx.fixed_scales import batches_of, find_roundings
from hf_earlyexit.onnx.layer_files import cut_pieces
from hf_earlyexit.onnx.manifest import ONE_FILE
from hf_earlyexit.onnx.quantize import quantize_graph
from hf_earlyexit.onnx.walk import walk_graph
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.serving.reader import reader_for
from hf_earlyexit.serving.tables import PIXELS
from tests.families.calibrated import calibrated, same, served
from tests.families.tiny import IMAGES

ALIKE = ("camembert", "xlm-roberta")  # roberta under another name: see tests/families/test_graphs.py
TRACED = [name for name, family in FAMILIES.items() if not family.untraced and name not in ALIKE]
EVERY_RULE, DEFAULT = ("bert", *IMAGES), "confidence"
CASES = [(name, rule) for name in TRACED for rule in (POLICIES.names() if name in EVERY_RULE else (DEFAULT, "beem-c"))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(name)`: what `calibrated` gives, the graph, and the files that were cut from it, read back."""

    @cache
    def make(name):
        family = calibrated(name)
        family.model.set_operating_points(family.policies, default=DEFAULT)
        folder = tmp_path_factory.mktemp(name)
        ee.export_onnx(family.model, folder)
        return SimpleNamespace(
            **vars(family),
            whole=walk_graph(family.model),
            one_file=(folder / ONE_FILE).read_bytes(),
            onnx=ee.OnnxClassifier.from_pretrained(folder, threads=1),
        )

    return make


def one_by_one(data, rows):
    """Exit layers and logits of the one-file form."""
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    names, done = [part.name for part in session.get_inputs()], []
    for row in rows:
        given = {name: np.asarray(values)[None] for name, values in row.items()}
        given["attention_mask"] = np.ones((1, len(row.get("input_ids", ()))), dtype=np.int64)
        done.append(session.run(["exit_layer", "logits"], {name: given[name] for name in names}))
    layers, logits = (torch.from_numpy(np.concatenate(part)) for part in zip(*done, strict=True))
    return layers, logits


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_rows_leave_every_form_where_calibration_says(name, rule, exported):
    family = exported(name)
    expected = family.expected[rule]
    assert len(expected[0].unique()) > 1 or rule == "static"
    assert same(served(family.onnx, family.rows, rule), expected)
    written = family.one_file if rule == DEFAULT else one_file(family.whole, family.model.config, family.policies[rule])
    assert same(one_by_one(written, family.rows), expected)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_files_of_another_rule_and_of_another_model_are_told_apart(name, exported):
    """The mutants of the law above."""
    family, other = exported(name), exported("electra" if name == "bert" else "deit")
    expected, policy = family.expected["beem-c"], family.policies["beem-c"]
    moved = policy.with_thresholds(tuple(1.05 * level for level in policy.thresholds))
    for mutant in (moved, family.policies["margin"]):
        assert not same(one_by_one(one_file(family.whole, family.model.config, mutant), family.rows), expected)
    assert not same(one_by_one(one_file(other.whole, other.model.config, policy), family.rows), expected)
    assert not same(served(other.onnx, family.rows, "beem-c"), expected)
    assert not same(served(family.onnx, family.rows[1:] + family.rows[:1], "beem-c"), expected)


def fixed(family):
    """Scales from rows that the tests do not look at."""
    shape = None if family.model.family.task != IMAGE else tuple(family.rows[0][PIXELS].shape)
    batches = batches_of(family.model, family.rows[200:250], reader_for(family.model), shape)
    return find_roundings(family.whole, batches)


@pytest.mark.parametrize("rounding", ["by token", "fixed"])
@pytest.mark.parametrize("name", TRACED)
def test_rows_of_layers_in_8_bits_do_not_see_each_other(name, rounding, exported):
    family = exported(name)
    rows, policy, roundings = family.rows[:200], family.policies["beem-c"], None if rounding == "by token" else fixed(family)
    small = quantize_graph(family.whole, roundings=roundings)
    model = OnnxClassifier(family.model.config, cut_pieces(small, family.model.config).__getitem__, "", "int8", threads=1)
    together = served(model, rows, "beem-c")
    alone = one_by_one(one_file(family.whole, model.config, policy, int8=True, roundings=roundings), rows)
    assert same(together, alone)
    assert same(served(model, rows[::-1], "beem-c"), tuple(part.flip(0) for part in alone))
    assert not same(together, tuple(part[:200] for part in family.expected["beem-c"]))

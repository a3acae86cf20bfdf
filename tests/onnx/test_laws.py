"""What every exported family keeps, texts and pictures alike: rows leave where calibration said, in both forms."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.onnx.classifier import OnnxClassifier
from hf_earlyexit.onnx.export import one_file
from hf_earlyexit.onnx.layer_files import cut_pieces
from hf_earlyexit.onnx.manifest import ONE_FILE
from hf_earlyexit.onnx.quantize import quantize_graph
from hf_earlyexit.onnx.walk import walk_graph
from hf_earlyexit.policies import POLICIES
from tests.families.tiny import IMAGES, VOCABULARY, batch_of, new_model, rows_of

ROWS, SPARE = 1000, 300
NEAR = 1e-4  # a score this near a threshold, or to another class, may fall on its other side in another runtime
ALIKE = ("camembert", "xlm-roberta")  # roberta under another name: see tests/families/test_graphs.py
TRACED = [name for name, family in FAMILIES.items() if not family.untraced and name not in ALIKE]
EXITS = {"albert": {"exit_layers": [1, 2, 4]}}
EVERY_RULE, DEFAULT = ("bert", *IMAGES), "confidence"
CASES = [(name, rule) for name in TRACED for rule in (POLICIES.names() if name in EVERY_RULE else (DEFAULT, "beem-c"))]


def rows_for(name):
    """Rows of several lengths, one token and the longest input among them, or pictures."""
    rows = rows_of(batch_of(name, rows=ROWS + SPARE, seed=1), segments=True)
    if name not in IMAGES:
        longest = FAMILIES[name].longest(new_model(name).config)
        rows[:2] = [{"input_ids": [VOCABULARY - 1] * length, "token_type_ids": [0] * length} for length in (1, longest)]
    return rows


def spread(model, rows):
    """Scale what exits say to deviations of 2, so that one rule parts the rows of every family."""
    for part, values in (
        ("exit_heads", lambda trace: trace.logits[:, :-1]),
        ("exit_gates", lambda trace: trace.scalars["gate"]),
    ):
        trace = ee.collect_trace(model, rows[:200], labelled=False, progress=False)
        for index, layer in enumerate(model.exit_layers[:-1]):
            module = getattr(model, part)[str(layer)]
            last = module.classifier if part == "exit_heads" else module.outer
            said = values(trace)[:, index].reshape(200, -1)
            with torch.no_grad():
                last.weight *= 2 / said.std(0)[:, None]
                last.bias.copy_((last.bias - said.mean(0)) * 2 / said.std(0))


def opened(rule, trace, share=0.4):
    """A policy of a kind that lets a share of a trace's rows go at each exit."""
    options = {"weights": (0.5, 1.5, 2.5)} if rule == "beem" else {}
    policy = POLICIES.get(rule).from_trace(trace, **options)
    if rule == "static":
        return type(policy).at(1, trace.num_exits)
    levels = policy.scan(trace).scores[:, :-1].quantile(1 - share, dim=0)
    levels = levels.round() if policy.counts else levels
    return policy.with_thresholds(tuple(levels.clamp(policy.lowest_threshold, policy.highest_threshold).tolist()))


@cache
def shared_rules():
    """A policy of every kind from the same random numbers: one graph of it serves all families."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 3, 3, generator=generator)
    scalars = {"gate": 2 * torch.randn(400, 2, generator=generator), "similarity": torch.rand(400, 3, generator=generator)}
    trace = ee.ExitTrace(logits=logits, labels=logits[:, -1].argmax(-1), exit_layers=(1, 2, 3), scalars=scalars)
    return {rule: replace(opened(rule, trace), exit_layers=None) for rule in POLICIES.names()}


def parts_rows(policy, trace):
    return len(policy.decide(policy.scan(trace).scores).unique()) > 1


def clear(policies, trace):
    """The first rows whose scores and answers are near no border."""
    top = trace.logits.topk(2, -1).values
    near = ((top[..., 0] - top[..., 1]) < NEAR).any(1)
    for policy in policies.values():
        levels = torch.tensor([torch.inf if level is None else level for level in policy.thresholds])
        if not policy.counts:
            near |= ((policy.scan(trace).scores[:, :-1] - levels).abs() < NEAR).any(1)
    return (~near).nonzero()[:ROWS, 0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(name)`: a family's model with a policy of every kind as an operating point, what calibration says of each,
    the files read back, and the graph that they were cut from."""

    @cache
    def make(name):
        model, rows = new_model(name, exit_gate="mlp+logits", **EXITS.get(name, {})), rows_for(name)
        spread(model, rows)
        trace = ee.collect_trace(model, rows, labelled=False, progress=False)
        policies = {
            rule: policy if rule == "static" or parts_rows(policy, trace) else opened(rule, trace)
            for rule, policy in shared_rules().items()
        }
        kept = clear(policies, trace)
        assert len(kept) == ROWS
        rows, trace = [rows[index] for index in kept.tolist()], trace.select(kept)
        model.set_operating_points(policies, default=DEFAULT)
        folder = tmp_path_factory.mktemp(name)
        ee.export_onnx(model, folder)
        return SimpleNamespace(
            model=model, rows=rows, policies=policies, whole=walk_graph(model), one_file=(folder / ONE_FILE).read_bytes(),
            calibrated={rule: decided(policy, trace) for rule, policy in policies.items()},
            onnx=ee.OnnxClassifier.from_pretrained(folder, threads=1),
        )  # fmt: skip

    return make


def decided(policy, trace):
    """Exit layers and answers that calibration counts on."""
    scan = policy.scan(trace)
    exits = policy.decide(scan.scores)
    return torch.tensor(trace.exit_layers)[exits], scan.answers[torch.arange(trace.num_rows), exits]


def served(model, rows, rule):
    answers = ee.predict(model, rows, operating_point=rule)
    return answers.exit_layer, answers.logits


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


def same(found, expected):
    return torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_rows_leave_every_form_where_calibration_says(name, rule, exported):
    family = exported(name)
    expected = family.calibrated[rule]
    assert len(expected[0].unique()) > 1 or rule == "static"
    for model in (family.model, family.onnx):
        assert same(served(model, family.rows, rule), expected)
    written = family.one_file if rule == DEFAULT else one_file(family.whole, family.model.config, family.policies[rule])
    assert same(one_by_one(written, family.rows), expected)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_files_of_another_rule_and_of_another_model_are_told_apart(name, exported):
    """The mutants of the law above."""
    family, other = exported(name), exported("electra" if name == "bert" else "deit")
    expected, policy = family.calibrated["beem-c"], family.policies["beem-c"]
    moved = policy.with_thresholds(tuple(1.05 * level for level in policy.thresholds))
    for mutant in (moved, family.policies["margin"]):
        assert not same(one_by_one(one_file(family.whole, family.model.config, mutant), family.rows), expected)
    assert not same(one_by_one(one_file(other.whole, other.model.config, policy), family.rows), expected)
    assert not same(served(other.onnx, family.rows, "beem-c"), expected)
    assert not same(served(family.onnx, family.rows[1:] + family.rows[:1], "beem-c"), expected)


@pytest.mark.parametrize("name", EVERY_RULE)
def test_rows_of_layers_in_8_bits_do_not_see_each_other(name, exported):
    family = exported(name)
    rows, policy, small = family.rows[:200], family.policies["beem-c"], quantize_graph(family.whole)
    model = OnnxClassifier(family.model.config, cut_pieces(small, family.model.config).__getitem__, "", "int8", threads=1)
    together, alone = served(model, rows, "beem-c"), one_by_one(one_file(small, model.config, policy), rows)
    assert same(together, alone)
    assert same(served(model, rows[::-1], "beem-c"), tuple(part.flip(0) for part in alone))
    assert not same(together, tuple(part[:200] for part in family.calibrated["beem-c"]))

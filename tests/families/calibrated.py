"""Families with a policy of every kind, and what calibration says of each on a thousand rows."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import torch

import hf_earlyexit as ee
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.policies import POLICIES

from .tiny import IMAGES, VOCABULARY, batch_of, new_model, rows_of, tiny

ROWS, SPARE = 1000, 300
NEAR = 1e-4  # a score this near a threshold, or to another class, may fall on its other side when sums are taken otherwise
EXITS = {"albert": {"exit_layers": [1, 2, 4]}}


@cache
def calibrated(name):
    """A family's model with three exits and a policy of every kind as an operating point, rows that no rounding moves, their
    trace, and the exit layers and answers that calibration counts on, by rule."""
    model, rows = new_model(name, exit_gate="mlp+logits", **EXITS.get(name, {})), rows_for(name)
    spread(model, rows)
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    policies = {
        rule: policy if rule == "static" or len(decided(policy, trace)[0].unique()) > 1 else opened(rule, trace)
        for rule, policy in shared_rules().items()
    }
    kept = clear(policies, trace)
    assert len(kept) == ROWS
    rows, trace = [rows[index] for index in kept.tolist()], trace.select(kept)
    model.set_operating_points(policies)
    expected = {rule: decided(policy, trace) for rule, policy in policies.items()}
    return SimpleNamespace(model=model, rows=rows, policies=policies, expected=expected)


def rows_for(name):
    """Rows of several lengths, one token and the longest input among them; or pictures."""
    rows = rows_of(batch_of(name, rows=ROWS + SPARE, seed=1), segments=True)
    if name not in IMAGES:
        longest = FAMILIES[name].longest(tiny(name).config)
        rows[:2] = [{"input_ids": [VOCABULARY - 1] * length, "token_type_ids": [0] * length} for length in (1, longest)]
    return rows


def spread(model, rows, deviation=2):
    """Scale what heads and gates say, so that one rule parts the rows of every family."""
    for gate in (False, True):  # gates read what heads say
        trace = ee.collect_trace(model, rows[:200], labelled=False, progress=False)
        for index, layer in enumerate(map(str, model.exit_layers[:-1])):
            linear = model.exit_gates[layer].outer if gate else model.exit_heads[layer].classifier
            values = trace.scalars["gate"][:, index, None] if gate else trace.logits[:, index]
            scale = deviation / values.std(0)
            with torch.no_grad():
                linear.weight *= scale[:, None]
                linear.bias.copy_((linear.bias - values.mean(0)) * scale)


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
    """A policy of every kind from the same random numbers; where it becomes a graph, one serves all families."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 3, 3, generator=generator)
    scalars = {
        "gate": 2 * torch.randn(400, 2, generator=generator),
        "similarity": torch.rand(400, 3, generator=generator),
    }
    trace = ee.ExitTrace(logits=logits, labels=logits[:, -1].argmax(-1), exit_layers=(1, 2, 3), scalars=scalars)
    return {rule: replace(opened(rule, trace), exit_layers=None) for rule in POLICIES.names()}


def clear(policies, trace):
    """The first rows whose scores and answers are near no border."""
    best, second = trace.logits.topk(2, -1).values.unbind(-1)
    near = (best - second < NEAR).any(1)
    for policy in policies.values():
        levels = torch.tensor([torch.inf if level is None else level for level in policy.thresholds])
        if not policy.counts:
            near |= ((policy.scan(trace).scores[:, :-1] - levels).abs() < NEAR).any(1)
    return (~near).nonzero()[:ROWS, 0]


def decided(policy, trace):
    """Exit layers and answers of a trace's rows."""
    scan = policy.scan(trace)
    exits = policy.decide(scan.scores)
    return torch.tensor(trace.exit_layers)[exits], scan.answers[torch.arange(trace.num_rows), exits]


def served(model, rows, rule, **options):
    """Exit layers and answers of `predict`."""
    answers = ee.predict(model, rows, operating_point=rule, **options)
    return answers.exit_layer, answers.logits


def same(found, expected):
    """Whether rows leave at the very layers, with the answers that are expected but for roundings."""
    return torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)

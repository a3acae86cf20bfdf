"""A policy for a family's tiny model, and what calibration says it does."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.policies import POLICIES


@pytest.fixture
def open_policy_of():
    """`open_policy_of(model, batch, name)`: a policy that lets rows go at several exits, its scores and its answers."""

    def make(model, batch, name):
        with torch.inference_mode():
            output = model(**batch, early_exit=False, exit_signals=model.signals)
        logits, scalars = output.exit_logits, output.exit_scalars
        trace = ee.ExitTrace(logits=logits, labels=logits[:, -1].argmax(-1), exit_layers=model.exit_layers, scalars=scalars)
        policy = POLICIES.get(name).from_trace(trace)
        scan = policy.scan(trace)
        levels = scan.scores[:, :-1].sort(0).values
        between = (levels[11] + levels[12]) / 2  # no row is near a threshold
        between = torch.ones_like(between) if policy.counts else between
        policy = policy.with_thresholds(tuple(between.clamp(policy.lowest_threshold, policy.highest_threshold).tolist()))
        return policy, scan.scores, scan.answers

    return make

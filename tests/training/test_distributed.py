"""Two processes train one model: equal weights on both, the metrics of one process where exits learn together."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from . import consistent_script, ddp_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what two ranks wrote for every case; one launch for all, since starting takes longest."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, ddp_script.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def read(folder, case, rank):
    return load_file(folder / f"{case}-{rank}.safetensors"), json.loads((folder / f"{case}-{rank}.json").read_text())


@pytest.mark.parametrize("case", ddp_script.CASES)
def test_two_ranks_end_with_equal_weights_and_the_metrics_of_one_process(two_ranks, tmp_path, case):
    (first, report), (second, other_report) = read(two_ranks, case, 0), read(two_ranks, case, 1)
    assert (report["world"], other_report["world"]) == (2, 2)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    ddp_script.train(tmp_path, case)
    alone, alone_report = read(tmp_path, case, 0)
    assert (alone_report["world"], alone_report["steps"], report["steps"]) == (1, 4, 4)
    assert alone_report["moved"] > 1e-2
    assert all(torch.allclose(alone[name], first[name], atol=1e-5) for name in alone)
    captions = case in ddp_script.CAPTIONERS
    kinds, more = (("token_accuracy", "agreement"), {"eval_gate_agreement"}) if captions else (("accuracy",), set())
    assert set(report["metrics"]) == {f"eval_exit_{layer}_{kind}" for layer in (1, 2, 3, 4) for kind in kinds} | more
    assert report["metrics"] == other_report["metrics"] == pytest.approx(alone_report["metrics"])


@pytest.mark.parametrize("case", ddp_script.BY_REWARD)
def test_two_ranks_that_learn_by_reward_end_with_equal_weights(two_ranks, case):
    first, second = (load_file(two_ranks / case / f"rank-{rank}.safetensors") for rank in (0, 1))
    start = consistent_script.make_model().state_dict()
    assert first.keys() == second.keys() == start.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in first)

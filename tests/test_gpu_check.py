"""The check for a CUDA device: what it does without one, and that it sees a road that is wrong."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from hf_earlyexit.serving.cuda_graphs import SegmentGraphs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check():
    pytest.importorskip("datasets", reason="datasets is missing, which the benchmarks read rows with (extra: train)")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_without_a_device_it_refuses(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_a_dry_run_finds_every_road_right(gpu_check, tmp_path, capsys):
    assert gpu_check.main(["--dry_run", "--output", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert (len(result["attention"]), len(result["checks"])) == (4, 9)
    assert max(found["difference"] for found in result["attention"].values()) < 1e-5
    assert not any(found["elsewhere"] for found in result["checks"].values())
    assert max(found["largest difference of logits"] for found in result["checks"].values()) < 1e-4
    assert result["dry_run"]
    assert not result["skipped"]
    tiny = result["ratios"]["tiny"]
    assert 5 < tiny["mean_layer"] < 7
    assert set(tiny["share_of_bound"]) == {"2048"}
    assert set(result["time"]["tiny"]) == {"early", "full"}


def test_a_road_that_is_wrong_is_named(gpu_check, monkeypatch):
    run = SegmentGraphs.run
    monkeypatch.setattr(
        SegmentGraphs, "run", lambda self, name, segment, hidden, *more: run(self, name, segment, hidden.roll(1, 0), *more)
    )
    check = gpu_check.Check(dry=True)
    monkeypatch.setattr(check, "measure", lambda name, shape: None)
    result = check.run()
    assert not result["right"]
    assert "float32: graphs, first pass, against the CPU in float32" in result["wrong"]
    late = gpu_check.Check(dry=True, minutes=0).run()
    assert not late["right"]  # nothing was looked at
    assert len(late["skipped"]) == 3


def test_attention_that_is_wrong_is_named(gpu_check, monkeypatch):
    attend = gpu_check.attend_at_once
    monkeypatch.setattr(gpu_check, "attend_at_once", lambda *given, window=None, **way: attend(*given, **way))
    check = gpu_check.Check(dry=True)
    monkeypatch.setattr(check, "measure", lambda name, shape: None)
    monkeypatch.setattr(check, "check", lambda dtype, shape: None)
    assert check.run()["wrong"] == ["float32: attention, window", "float32: attention, window, backwards"]

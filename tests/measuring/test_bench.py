"""The benchmark tells ratios, bounds and, where it must, that early exit is the wrong tool."""

import json

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import UsageError
from hf_earlyexit.measuring import bench as bench_module
from hf_earlyexit.measuring.bench import EARLY, FORWARD, FULL, STOCK, advice, as_table, bench, exits_of
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.transfer import finished


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    return model


def figures(early, full=1.0, static=1.0, at_one=1.0):
    times = {STOCK: 2.0, FULL: full, EARLY: early, FORWARD: 1.0, "first 2 layers": static}
    many = {way: {"seconds": seconds} for way, seconds in times.items()}
    return {"throughput": {"m": many}, "latency": {"m": {STOCK: {"seconds": at_one}, FORWARD: {"seconds": 1.0}}}}


def test_every_way_is_measured_and_told(model, tokenizer, random_texts):
    rows = encode_rows(random_texts(40), tokenizer)
    result = bench({"fp32": model}, rows, repeats=2, latency_rows=3)
    assert json.loads(json.dumps(result)) == result
    assert set(result["throughput"]["fp32"]) >= {STOCK, FULL, FORWARD, EARLY}
    assert result["throughput"]["fp32"][STOCK]["speed_up"] == 1
    for found in result["throughput"]["fp32"].values():
        assert 0 < found["low"] <= found["speed_up"] <= found["high"]
    for found in result["latency"]["fp32"].values():
        assert 0 < found["p50_ms"] <= found["p95_ms"]
    for way in (STOCK, FULL, FORWARD, EARLY):
        assert f"| fp32 | {way} |" in as_table(result)


def test_the_bound_weighs_layers_with_tokens(tiny_model):
    model = tiny_model()
    model.set_exit_policy(ee.StaticPolicy.at(1, 4))
    rows = [{"input_ids": [5] * 10}, {"input_ids": [5] * 30}]
    answers = ee.predict(model, rows)
    exits = exits_of(model, rows, answers._replace(exit_layer=answers.exit_layer.new_tensor([1, 4])))
    assert exits == pytest.approx({"mean_layer": 2.5, "layer_speed_up": 1.6, "token_layer_bound": 160 / 130})


def test_the_clock_is_read_when_the_device_has_finished(model, tokenizer, random_texts, monkeypatch):
    rows, told = encode_rows(random_texts(5), tokenizer), []
    model_forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: (told.append("forward"), model_forward(*a, **k))[1])
    monkeypatch.setattr(bench_module, "finished", lambda device: told.append(f"wait for {device}"))
    ways = bench_module.ways_to_run(model, 2, 2)
    ways[FORWARD](rows)
    assert told == ["forward"] * 3 + ["wait for cpu"]
    told.clear()
    ways[STOCK](rows)
    assert told == ["wait for cpu"]


def test_accelerators_are_waited_for_and_the_cpu_is_not(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for kind in ("cpu", "cuda", "mps"):
        finished(torch.device(kind))
    assert waited == [torch.device("cuda"), torch.device("mps")]


@pytest.mark.parametrize("warm_up", [1, 2])
def test_turns_to_warm_up_are_not_counted(warm_up):
    seconds = []

    def job():
        seconds.append(len(seconds) + 1.0)

    def clock():
        return sum(seconds)

    found = bench_module._in_turns({"way": [job]}, 3, clock, 0, warm_up)
    assert found["way"].flatten().tolist() == [warm_up + 1.0, warm_up + 2.0, warm_up + 3.0]


def test_advice_is_plain():
    assert advice(figures(0.5, static=0.6), "m").endswith("and 1.20x that of the first 2 layers alone.")
    assert "take that one if it is as accurate" in advice(figures(0.5, static=0.4), "m")
    assert advice(figures(0.99), "m").startswith("Early exit is the wrong tool here: 1.01x")


def test_a_model_without_a_policy_and_no_rows_are_refused(tiny_model, model):
    with pytest.raises(UsageError, match="fp32 has no exit policy"):
        bench({"fp32": tiny_model()}, [{"input_ids": [5]}])
    with pytest.raises(UsageError, match="no rows"):
        bench({"fp32": model}, [])


def test_the_command_prints_a_table_and_writes_json(model, tokenizer, random_texts, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(random_texts(20)), encoding="utf-8")
    words = ["--model", "model", "--input", "texts.txt", "--output", "speed.json"]
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in words]
    assert main(["bench", *words, "--repeats", "1", "--latency_rows", "2", "--int8", "true"]) == 0
    told = capsys.readouterr().out
    assert "| int8 | early exit |" in told
    assert "token-layer bound" in told
    assert set(json.loads((tmp_path / "speed.json").read_text())["exits"]) == {"fp32", "int8"}


def test_the_command_measures_in_half_precision_and_refuses_what_is_not_there(
    model, tokenizer, random_texts, tmp_path, capsys
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(random_texts(9)), encoding="utf-8")
    words = [
        "bench",
        "--model",
        str(tmp_path),
        "--input",
        str(tmp_path / "texts.txt"),
        "--repeats",
        "1",
        "--latency_rows",
        "2",
    ]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert "| bf16 | early exit |" in capsys.readouterr().out
    for wrong, said in (
        (["--dtype", "float8"], "dtype is 'float8'; expected float32"),
        (["--device", "nowhere"], "device is"),
    ):
        assert main([*words, *wrong]) != 0
        assert said in capsys.readouterr().err

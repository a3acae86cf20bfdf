"""The benchmark tells ratios, bounds and, where it must, that early exit is the wrong tool."""

import json
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import UsageError
from hf_earlyexit.forms import table
from hf_earlyexit.measuring import forms as forms_module
from hf_earlyexit.measuring import ways as ways_module
from hf_earlyexit.measuring.bench import advice, as_table, bench, exits_of
from hf_earlyexit.measuring.forms import MEASURED, make_forms, what_lacks
from hf_earlyexit.measuring.onnx_forms import OnnxForm
from hf_earlyexit.measuring.ways import EARLY, FORWARD, FULL, ONE_FILE, STOCK, Ways, torch_ways
from hf_earlyexit.serving.batching import pad_batch
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.transfer import finished
from tests.families.tiny import new_model


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model(num_hidden_layers=3)
    model.set_exit_policy(open_policy(model, "confidence"))
    return model


FIRST = "first 2 layers"


def figures(**seconds):
    """Of models by name: seconds of the full model, of early exit and of the first layers, in batches and one by one."""
    result = {"throughput": {}, "latency": {}}
    for name, (full, early, static, full_1, early_1, static_1) in seconds.items():
        many = {FULL: full, EARLY: early, FIRST: static}
        single = {STOCK: full_1, FORWARD: early_1, FIRST: static_1}
        result["throughput"][name] = {way: {"seconds": s, "rows_per_second": 60 / s} for way, s in many.items()}
        result["latency"][name] = {way: {"seconds": s, "p50_ms": 100 * s} for way, s in single.items()}
    return result


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
    assert (result["turns"], result["latency_rows"]) == (2, 3)
    assert result["advice"] == advice(result)


def test_single_rows_of_a_way_are_answered_one_after_another(model, tokenizer, random_texts):
    """Else each would begin with caches full of other models' weights."""
    calls = []

    def way(name):
        return lambda rows: calls.append(name)

    single = {name: way(name) for name in (FULL, EARLY, ONE_FILE, FIRST)}
    many = {name: way("") for name in (FULL, EARLY, FIRST)}
    form = SimpleNamespace(served=model, ways=lambda *given: Ways(many, single))
    bench({"fp32": form}, encode_rows(random_texts(5), tokenizer), repeats=2, latency_rows=3)
    alone = [name for name in calls if name]
    assert [len(list(same)) % 3 for _, same in groupby(alone)] == [0] * len(list(groupby(alone)))
    assert len(alone) == 3 * 4 * 3


@pytest.fixture(scope="module")
def onnx_forms(model):
    return {int8: OnnxForm(model, int8) for int8 in (False, True)}


@pytest.mark.parametrize("int8", [False, True])
def test_rivals_of_onnx_runtime_answer_as_the_full_and_the_cut_off_model(onnx_forms, model, tokenizer, random_texts, int8):
    rows = encode_rows(random_texts(9), tokenizer)
    longest_first = sorted(range(9), key=lambda row: -len(rows[row]["input_ids"]))
    ways = onnx_forms[int8].ways(4, 2)
    expected = model(**pad_batch([rows[row] for row in longest_first]), early_exit=False).exit_logits
    near = 0.15 if int8 else 1e-4  # logits up to 1.5; ONNX Runtime rounds inputs by the batch
    for way, exit_index in ((FULL, -1), (FIRST, model.exit_layers.index(2))):
        batches = ways.many[way](rows)
        assert [len(batch) for batch in batches] == [4, 4, 1]
        assert torch.tensor(np.concatenate(batches)) == pytest.approx(expected[:, exit_index].detach(), abs=near)
        alone = ways.single[way](rows[:1])[0][0]
        assert alone == pytest.approx(expected[longest_first.index(0), exit_index].detach().numpy(), abs=near)


@pytest.mark.parametrize("int8", [False, True])
def test_onnx_forms_leave_where_predict_leaves(onnx_forms, tokenizer, random_texts, int8):
    rows = encode_rows(random_texts(9), tokenizer)
    form = onnx_forms[int8]
    ways, expected = form.ways(4, 2), ee.predict(form.served, rows)
    assert ways.many[EARLY](rows).exit_index.tolist() == [
        form.served.exit_layers.index(x) for x in expected.exit_layer.tolist()
    ]
    for row, logits in zip(rows, expected.logits, strict=True):
        assert ways.single[ONE_FILE]([row])[0][0] == pytest.approx(logits.numpy(), abs=1e-4)


def test_rows_that_are_padded_are_told_with_the_reason():
    model, packed = new_model("mpnet", num_hidden_layers=2), new_model("bert", num_hidden_layers=2)
    for one in (model, packed):
        one.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.5]))
    result = bench({"mpnet": model, "bert": packed}, [{"input_ids": [5, 6, 7]}] * 2, repeats=1, latency_rows=1)
    assert result["padded"] == {"mpnet": "MPNet layers compute attention in a way of their own"}


def test_an_early_exit_in_onnx_runtime_is_measured_beside_its_rivals(onnx_forms, model, tokenizer, random_texts):
    rows = encode_rows(random_texts(6), tokenizer)
    result = bench({"fp32": model, "onnx": onnx_forms[False]}, rows, static_layer=2, repeats=1, latency_rows=2)
    assert set(result["throughput"]["onnx"]) == {FULL, EARLY, FIRST}
    assert set(result["latency"]["onnx"]) == {FULL, FORWARD, EARLY, ONE_FILE, FIRST}
    assert f"| onnx | {ONE_FILE} | - | - |" in as_table(result)
    assert result["exits"]["onnx"]["share_of_bound_at_batch_1"] > 0
    assert result["environment"]["versions"]["onnxruntime"]


def test_a_static_layer_without_an_exit_is_refused(onnx_forms, tiny_model):
    form = OnnxForm.__new__(OnnxForm)
    form.served = onnx_forms[False].served
    with pytest.raises(UsageError, match=r"no exit after layer 9; expected one of 1, 2, 3"):
        form.ways(4, 9)
    with pytest.raises(UsageError, match="no exit policy"):
        OnnxForm(tiny_model())


def test_forms_that_run_here_are_made_and_others_are_named(model, monkeypatch):
    monkeypatch.setattr(forms_module, "what_lacks", lambda name, device: "it is a test" if name == "bf16" else None)
    monkeypatch.setattr(forms_module, "_MAKE", {name: lambda model, rows: model for name in MEASURED})
    made = make_forms(model, [])
    assert set(made.models) == set(MEASURED) - {"bf16"}
    assert made.left_out == {"bf16": "it is a test"}
    with pytest.raises(UsageError, match="'bf16' does not run here: it is a test"):
        make_forms(model, [], ["fp32", "bf16"])
    with pytest.raises(UsageError, match=r"forms holds 'int9'; expected some of fp32, bf16"):
        make_forms(model, [], ["int9"])


def test_what_a_form_lacks(monkeypatch):
    assert "the model is on cuda" in what_lacks("int8", torch.device("cuda"))
    assert what_lacks("bf16", torch.device("cuda")) is None
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    assert 'pip install "hf_earlyexit[onnx]"' in what_lacks("onnx", torch.device("cpu"))


def test_the_bound_weighs_layers_with_tokens(tiny_model):
    model = tiny_model()
    model.set_exit_policy(ee.policies.StaticPolicy.at(1, 4))
    rows = [{"input_ids": [5] * 10}, {"input_ids": [5] * 30}]
    answers = ee.predict(model, rows)
    exits = exits_of(model, rows, answers._replace(exit_layer=answers.exit_layer.new_tensor([1, 4])))
    assert exits == pytest.approx({"mean_layer": 2.5, "layer_speed_up": 1.6, "token_layer_bound": 160 / 130})


def test_the_clock_is_read_when_the_device_has_finished(model, tokenizer, random_texts, monkeypatch):
    rows, told = encode_rows(random_texts(5), tokenizer), []
    model_forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: (told.append("forward"), model_forward(*a, **k))[1])
    monkeypatch.setattr(ways_module, "finished", lambda device: told.append(f"wait for {device}"))
    ways = torch_ways(model, 2, 2).many
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


def test_advice_names_the_fastest_way_for_each_use():
    told = advice(figures(fp32=(6, 3, 4, 6, 3, 4), int8=(4, 2, 2.5, 3, 2, 2.5)))
    assert told == (
        "For throughput run int8, early exit: 30 rows/s, 2.00x the fastest full model (int8, full). For latency run int8, "
        "early exit, arrival order: 200.0 ms (p50), 1.50x the fastest full model (int8, full, arrival order). A model that "
        "is cut off has 0.80x that throughput (int8, first 2 layers) and 0.80x that speed row by row (int8, first 2 "
        "layers): it is no rival."
    )


def test_advice_compares_with_the_fastest_full_model_of_any_form():
    told = advice(figures(fp32=(6, 3, 4, 6, 3, 4), onnx=(3.1, 9, 4, 3.1, 9, 4)))
    assert told.startswith("Early exit is not worth it here: 1.03x the throughput of the fastest full model (onnx, full)")


def test_advice_says_where_a_model_that_is_cut_off_is_faster():
    assert advice(figures(fp32=(6, 3, 2.5, 6, 3, 4))).endswith("take it if it is as accurate.")


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
    assert main(["bench", *words, "--repeats", "1", "--latency_rows", "2", "--forms", "fp32", "int8"]) == 0
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
    assert main([*words, "--forms", "bf16"]) == 0
    assert "| bf16 | early exit |" in capsys.readouterr().out
    for wrong, said in (
        (["--forms", "float8"], "forms holds 'float8'; expected some of fp32"),
        (["--device", "nowhere"], "device is"),
    ):
        assert main([*words, *wrong]) != 0
        assert said in capsys.readouterr().err

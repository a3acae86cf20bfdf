"""Copies in bfloat16: close to the model, calibrated on their own logits, never where the processor lacks instructions."""

import copy

import pytest
import torch
from torch import nn

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, UsageError
from hf_earlyexit.serving.batching import evaluating
from hf_earlyexit.serving.bf16 import MOST, Bf16Linear, to_bf16
from hf_earlyexit.serving.walker import ModelWalker

from .test_int8 import NEAR, company

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no instructions for bfloat16"
)


@pytest.fixture(scope="module")
def small(model, open_policy):
    small = to_bf16(model)
    small.set_exit_policy(open_policy(small, "confidence"))
    return small


@pytest.mark.parametrize(("inside", "outside", "bias"), [(64, 32, True), (30, 16, False), (768, 96, True), (3072, 64, True)])
def test_a_linear_map_is_nearly_the_same_and_a_token_the_same_to_the_bit_in_every_company(inside, outside, bias):
    torch.manual_seed(0)
    linears = [nn.Linear(inside, outside, bias=bias) for _ in range(2)]
    mapped, inputs = Bf16Linear(*linears), torch.randn(700, inside).bfloat16()
    assert len(mapped.parts) == -(-inside // MOST)
    with torch.inference_mode():
        together = mapped(inputs)
        exact = torch.cat([linear(inputs.float()) for linear in linears], 1)
        single = torch.cat([Bf16Linear(linear)(inputs) for linear in linears], 1)
        for size in (1, 2, 3, 17, 32, 33, 64, 127, 129, 160, 257, 511):
            some = torch.randperm(700)[:size]
            assert torch.equal(mapped(inputs[some]), together[some]), size
        assert mapped(inputs[:0]).shape == (0, 2 * outside)
        assert torch.equal(mapped(inputs[:6].view(2, 3, -1)), together[:6].view(2, 3, -1))
    assert together.dtype == torch.bfloat16
    assert torch.equal(together, single)
    assert (together - exact).abs().max() <= 0.02 * exact.abs().max()


def test_rows_never_see_each_other(small, tokenizer, random_texts):
    states, logits, moved = company(small, tokenizer, random_texts)
    assert (states, moved) == (0.0, 0)
    assert logits <= NEAR


def test_layers_are_rounded_and_heads_are_not(model, small, random_batch):
    kinds = {name: type(part) for name, part in small.named_modules() if isinstance(part, (nn.Linear, Bf16Linear))}
    assert {name for name, kind in kinds.items() if kind is Bf16Linear} == {name for name in kinds if ".layer." in name}
    rounded = {name for name, part in small.named_parameters() if part.dtype == torch.bfloat16}
    assert rounded
    assert rounded == {name for name, _ in small.named_parameters() if ".layer." in name}
    batch = random_batch(50)
    with torch.inference_mode():
        exact, found = (one(**batch, early_exit=False).exit_logits for one in (model, small))
        again = copy.deepcopy(small)(**batch, early_exit=False).exit_logits
        served = small(**batch)
        nobody = {name: values[:0] for name, values in batch.items()}
        assert small(**nobody).logits.dtype == small(**nobody, early_exit=False).exit_logits.dtype == torch.float32
        shown = small(**batch, early_exit=False, output_hidden_states=True).hidden_states
    assert torch.equal(again, found)
    assert found.dtype == served.logits.dtype == torch.float32
    assert not torch.equal(found.bfloat16().float(), found)  # heads add up in float32: scores do not tie
    assert 0 < (exact - found).abs().mean() < 0.1
    assert len(shown) == 5
    assert ModelWalker(small).packs
    assert evaluating(small) is small  # or every call would make a view of all its modules


def test_a_copy_is_calibrated_on_its_own_trace_refuses_other_thresholds_and_is_not_saved(tiny_model, tmp_path):
    model = tiny_model().eval()
    for (
        layer
    ) in model.base_model.encoder.layer:  # weights that bfloat16 holds as they are: the layers still compute otherwise
        layer.bfloat16().float()
    ids = [{"input_ids": [2, *(5 + (place * step) % 20 for step in range(1, 3 + place % 9)), 3]} for place in range(300)]
    labels = ee.predict(model, ids).logits.argmax(-1).tolist()
    target, options = ee.MaxDrop(0.2), {"keep_weak_exits": True}
    result = ee.calibrate(ee.collect_trace(model, ids, labels=labels, progress=False), "confidence", target, **options)
    model.set_exit_policy(result)
    model.set_operating_points({"fast": result})
    small = to_bf16(model)
    assert small.exit_policy is None
    assert small.operating_points == ("exact",)
    with pytest.raises(CheckpointError, match="chosen on a model"):
        small.set_exit_policy(result)
    trace = ee.collect_trace(small, ids, labels=labels, progress=False)
    assert trace.meta["dtype"] == "bfloat16"
    own = ee.calibrate(trace, "confidence", target, **options)
    small.set_exit_policy(own)
    assert small.config.exit_certificate["dtype"] == "bfloat16"
    replayed, answers = ee.replay(own.policy, trace), ee.predict(small, ids)
    assert answers.exit_layer.float().mean() == pytest.approx(replayed.mean_layers, abs=1e-5)  # served is calibrated
    assert len(answers.exit_layer.unique()) > 1
    assert answers.form == "bf16"
    with pytest.raises(UsageError, match="save the model it was made from"):
        small.save_pretrained(tmp_path)
    for again in (to_bf16, ee.quantize_int8, lambda model: ee.export_onnx(model, tmp_path / "onnx")):
        with pytest.raises(UsageError, match=r"The model is bf16 on cpu; .* needs float32"):
            again(small)
    with pytest.raises(CheckpointError, match="chosen on a model"):
        model.set_exit_policy(own)


def test_models_of_another_precision_and_processors_without_instructions_are_refused(model, monkeypatch):
    with pytest.raises(UsageError, match="bfloat16 on cpu; bf16 needs float32"):
        to_bf16(copy.deepcopy(model).bfloat16())
    monkeypatch.setattr("hf_earlyexit.serving.bf16._supported", lambda: False)
    with pytest.raises(UsageError, match="'bf16' does not run here: this processor has no instructions for bfloat16"):
        to_bf16(model)

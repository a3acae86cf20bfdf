"""Int8 copies: close to the model, calibrated on their own logits, never saved by mistake."""

import copy
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, UsageError
from hf_earlyexit.serving import int8
from hf_earlyexit.serving.batching import evaluating
from hf_earlyexit.serving.int8 import Int8Linear
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker

NEAR = 1e-5  # heads stay in float32, whose sums depend a little on the number of rows
OLD_CPU = """
import torch
from hf_earlyexit.serving import int8
from hf_earlyexit.serving.batching import evaluating
linear, inputs = torch.nn.Linear(64, 8, bias=False), torch.ones(40, 64)
torch.nn.init.ones_(linear.weight)
inputs[:, 0] = 0
right = []
for int8.LARGEST in (63, 127):
    with torch.inference_mode():
        right.append(torch.allclose(int8.Int8Linear(linear)(inputs), torch.full((40, 8), 63.0)))
assert right == [True, False], right
"""


def test_a_linear_map_in_8_bits_is_nearly_the_same():
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(64, 32), torch.randn(4, 5, 64)
    with torch.inference_mode():
        exact, rounded = linear(inputs), Int8Linear(linear)(inputs)
    assert rounded.shape == exact.shape
    assert (rounded - exact).abs().max() < 0.05


@pytest.mark.parametrize(("width", "bias"), [(64, True), (30, False)])
def test_maps_of_one_input_stand_side_by_side(width, bias):
    torch.manual_seed(0)
    linears, inputs = [nn.Linear(width, 16, bias=bias) for _ in range(3)], torch.randn(7, width)
    with torch.inference_mode():
        joint, single = Int8Linear(*linears)(inputs), [Int8Linear(linear)(inputs) for linear in linears]
    assert torch.equal(joint, torch.cat(single, 1))


def test_tokens_without_spread_and_of_any_size_are_read():
    linear, inputs = nn.Linear(64, 32), torch.randn(4, 64) * torch.tensor([[0.0], [1e-3], [1.0], [1e4]])
    with torch.inference_mode():
        exact, rounded = linear(inputs), Int8Linear(linear)(inputs)
        assert Int8Linear(linear)(inputs[:0]).shape == (0, 32)
    assert ((rounded - exact).abs().amax(1) <= 0.03 * inputs.abs().amax(1) + 1e-6).all()


class BatchLinear(nn.Module):
    """The mutant: torch's own 8-bit map, which rounds by the largest value of the whole batch."""

    def __init__(self, *linears):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        scale = weight.abs().amax(1) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale, dtype=torch.long), 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, torch.cat([x.bias.detach() for x in linears]))

    def forward(self, inputs):
        return torch.ops.quantized.linear_dynamic(inputs, self.packed, False)


def token_changes(kind):
    """Tokens of 700 whose outputs change to any bit when fewer of them come together."""
    torch.manual_seed(0)
    mapped, inputs = kind(nn.Linear(64, 32)), torch.randn(700, 64)
    with torch.inference_mode():
        together, order = mapped(inputs), torch.randperm(700)
        return sum(
            int((mapped(inputs[some]) != together[some]).any(1).sum())
            for size in (1, 2, 3, 17, 127, 129, 160, 511)
            for some in [order[:size]]
        )


def test_a_token_is_the_same_to_the_bit_in_every_company():
    assert token_changes(Int8Linear) == 0
    assert token_changes(BatchLinear) > 100


def company(model, tokenizer, random_texts):
    """How far rows are from themselves in other company.

    Largest difference of a hidden state after the layers, of a logit, of a score, and the number of other exit layers:
    packed together, in the engine in any order and chunking, and by `forward` in batches and through all exits.
    """
    rows = encode_rows(random_texts(150, longest=40), tokenizer)
    walker, policy = ModelWalker(model), model.exit_policy

    def states(some):
        hidden, context = walker.begin(some)
        for layer in range(1, 5):
            hidden = walker.run_layer(layer, hidden, context)
        return hidden.split(context.lengths)

    with torch.inference_mode():
        states_apart = max(float((one - states([row])[0]).abs().max()) for one, row in zip(states(rows), rows, strict=True))
        alone = [model(input_ids=torch.tensor([row["input_ids"]])) for row in rows]
        every = [model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False).exit_logits for row in rows]
        logits, layers = (torch.cat([getattr(one, name) for one in alone]) for name in ("logits", "exit_layer"))
        logits_apart, moved = 0.0, 0
        for budget in (1, 50, 256, 100_000):
            order = torch.randperm(150, generator=torch.Generator().manual_seed(budget))
            got = Scheduler(walker, policy, budget).run([rows[place] for place in order.tolist()])
            logits_apart = max(logits_apart, float((got.logits - logits[order]).abs().max()))
            moved += int((got.exit_index + 1 != layers[order]).sum())
        for size in (7, 150):
            for start in range(0, 150, size):
                batch = tokenizer.pad(rows[start : start + size], return_tensors="pt")
                here = slice(start, start + size)
                got = model(**batch)
                logits_apart = max(logits_apart, float((got.logits - logits[here]).abs().max()))
                moved += int((got.exit_layer != layers[here]).sum())
                full = model(**batch, early_exit=False).exit_logits
                logits_apart = max(logits_apart, float((full - torch.cat(every[here])).abs().max()))
    assert len(set(layers.tolist())) >= 3
    return states_apart, logits_apart, moved


def test_rows_never_see_each_other(model, tokenizer, random_texts, open_policy, monkeypatch):
    small = ee.quantize_int8(model)
    small.set_exit_policy(open_policy(small, "confidence"))
    states, logits, moved = company(small, tokenizer, random_texts)
    assert (states, moved) == (0.0, 0)
    assert logits <= NEAR
    monkeypatch.setattr(int8, "Int8Linear", BatchLinear)
    mutant = ee.quantize_int8(model)
    mutant.set_exit_policy(small.exit_policy)
    states, logits, moved = company(mutant, tokenizer, random_texts)
    assert states > 1e-2
    assert logits > 100 * NEAR
    assert moved > 0


def test_a_full_pass_of_a_copy_is_served_to_the_bit(model, random_batch):
    small, batch = ee.quantize_int8(model), random_batch(40)
    with torch.inference_mode():
        full = small(**batch, early_exit=False)
        small.set_exit_policy(ee.ConfidencePolicy(thresholds=[1.0] * 3))
        served = small(**batch)
        again = copy.deepcopy(small)(**batch)
        shown = small(**batch, early_exit=False, output_hidden_states=True)
    assert torch.equal(full.logits, served.logits)
    assert full.exit_layer.tolist() == [4] * 40
    assert torch.equal(again.logits, served.logits)
    assert len(shown.hidden_states) == 5
    assert ModelWalker(small).packs


def test_without_8_bit_kernels_the_numbers_are_the_same(model, random_batch, monkeypatch):
    batch, fast = random_batch(20), ee.quantize_int8(model)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    slow = ee.quantize_int8(model)
    with torch.inference_mode():
        fast, slow = (one(**batch, early_exit=False).exit_logits for one in (fast, slow))
    assert (fast - slow).abs().max() <= 0.01


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() != "x86_64",
    reason="no x86 processor or no oneDNN: only the former has the older 8-bit instructions, only the latter chooses them",
)
def test_smaller_weights_keep_older_instructions_from_overflowing():
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    child = subprocess.run([sys.executable, "-c", OLD_CPU], env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]


def test_layers_are_copied_in_8_bits_and_heads_are_not(model, random_batch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = ee.quantize_int8(model)
    kinds = {
        name: type(module) for name, module in small.named_modules() if isinstance(module, (torch.nn.Linear, Int8Linear))
    }
    assert {name for name, kind in kinds.items() if kind is Int8Linear} == {name for name in kinds if ".layer." in name}
    assert sum(name.endswith(".joint") for name in kinds) == 4  # query, key and value once more, as one map
    assert sum(kind is Int8Linear for name, kind in kinds.items() if not name.endswith(".joint")) == 4 * 6
    assert evaluating(small) is small  # or every call would make a view of all its modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = random_batch(50)
    with torch.inference_mode():
        exact, rounded = (one(**batch, early_exit=False).exit_logits for one in (model, small))
    assert 0 < (exact - rounded).abs().mean() < 0.1
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.9


def test_a_copy_is_calibrated_on_its_own_trace_and_predicts(model, tokenizer, random_texts):
    small = ee.quantize_int8(model)
    assert small.exit_policy is None
    assert model.exit_policy is not None
    texts = random_texts(200)
    labels = ee.predict(model, texts, tokenizer=tokenizer, early_exit=False).logits.argmax(-1).tolist()
    trace = ee.collect_trace(small, texts, tokenizer=tokenizer, labels=labels, progress=False)
    small.set_exit_policy(ee.calibrate(trace, "confidence", ee.LayerBudget(3), keep_weak_exits=True))
    answers = ee.predict(small, texts, tokenizer=tokenizer)
    assert 1 <= answers.exit_layer.float().mean() <= 3.2


def test_a_copy_is_not_saved(model, tmp_path):
    with pytest.raises(UsageError, match="save the model it was made from"):
        ee.quantize_int8(model).save_pretrained(tmp_path)


def test_other_precisions_are_refused(tiny_model):
    with pytest.raises(UsageError, match="bfloat16 on cpu; int8 needs float32"):
        ee.quantize_int8(tiny_model().bfloat16())


def test_a_copy_keeps_no_thresholds_and_no_promise_and_certifies_on_its_own_rows(tiny_model):
    from hf_earlyexit.calibration import Certified

    model = tiny_model().eval()
    ids = [{"input_ids": [2, *(5 + (place * step) % 20 for step in range(1, 3 + place % 9)), 3]} for place in range(300)]
    target = Certified(0.4, 0.9, risk="disagreement")
    kept = ee.calibrate(
        ee.collect_trace(model, ids, labelled=False, progress=False), "confidence", target, keep_weak_exits=True
    )
    model.set_exit_policy(kept)
    model.set_operating_points({"fast": kept})
    small = ee.quantize_int8(model)
    assert small.exit_policy is None
    assert small.operating_points == ("exact",)
    assert small.config.exit_certificate is None
    assert not small.config.exit_point_certificates
    assert model.config.exit_certificate["promise"]["limit"] == 0.4  # the model's own stays
    with pytest.raises(CheckpointError, match="chosen on a model"):
        small.set_exit_policy(kept)
    trace = ee.collect_trace(small, ids, labelled=False, progress=False)
    assert trace.meta["dtype"] == "int8"
    small.set_exit_policy(ee.calibrate(trace, "confidence", target, keep_weak_exits=True))
    assert small.config.exit_certificate["dtype"] == "int8"
    assert small.config.exit_certificate["promise"]["num_rows"] == 240

"""Int8 copies: close to the model, calibrated on their own logits, never saved by mistake."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from hf_earlyexit.inference.quantize import Int8Linear


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    return model


def test_a_linear_map_in_8_bits_is_nearly_the_same():
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(64, 32), torch.randn(4, 5, 64)
    with torch.inference_mode():
        exact, rounded = linear(inputs), Int8Linear(linear)(inputs)
    assert rounded.shape == exact.shape
    assert (rounded - exact).abs().max() < 0.05


def test_layers_are_copied_in_8_bits_and_heads_are_not(model, random_batch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = ee.quantize_int8(model)
    kinds = {
        name: type(module) for name, module in small.named_modules() if isinstance(module, (torch.nn.Linear, Int8Linear))
    }
    assert {name for name, kind in kinds.items() if kind is Int8Linear} == {name for name in kinds if ".layer." in name}
    assert sum(kind is Int8Linear for kind in kinds.values()) == 4 * 6
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

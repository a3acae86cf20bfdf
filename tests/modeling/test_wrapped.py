"""What other libraries put around a model is taken off, or refused in words."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_earlyexit.errors import UsageError
from hf_earlyexit.modeling.wrapped import unwrapped, unwrapped_without_adapters
from tests.conftest import SHAPE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


WRAPPERS = {
    "nothing": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "LoRA": lora,
    "LoRA, compiled, in parallel": lambda model: nn.DataParallel(torch.compile(lora(model), backend="eager")),
    "LoRA inside": lambda model: lora(torch.compile(model, backend="eager")._orig_mod),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_very_model_comes_out(name, tiny_model):
    model = tiny_model()
    assert unwrapped(WRAPPERS[name](model)) is model


@pytest.mark.parametrize("name", ["LoRA", "LoRA, compiled, in parallel"])
def test_adapters_are_refused_where_plain_maps_are_needed(name, tiny_model):
    model = tiny_model()
    wrapped = WRAPPERS[name](model)
    with pytest.raises(UsageError, match=r"int8 needs them merged: call model.merge_and_unload\(\)"):
        unwrapped_without_adapters(wrapped, "int8")
    with pytest.raises(UsageError, match="PEFT adapters"):  # the model that PEFT changed in place
        unwrapped_without_adapters(model, "int8")


def test_a_merged_model_is_plain_again(tiny_model):
    merged = lora(tiny_model()).merge_and_unload()
    assert unwrapped_without_adapters(merged, "int8") is merged


def test_prompts_before_the_input_are_refused_by_name(tiny_model):
    prompted = get_peft_model(tiny_model(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(UsageError, match="with PromptTuningConfig changes the inputs"):
        unwrapped(prompted)


@pytest.mark.parametrize("make", [lambda: BertForSequenceClassification(BertConfig(**SHAPE)), lambda: nn.Linear(1, 1)])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_models_without_exits_are_refused_with_their_class(make, wrap):
    plain = make()
    with pytest.raises(UsageError, match=f"{type(plain).__name__} has no exits; expected a model with exits"):
        unwrapped(wrap(plain))


@pytest.mark.parametrize("value", [None, "folder", 3])
def test_what_is_no_model_is_refused(value):
    with pytest.raises(UsageError, match="has no exits"):
        unwrapped(value)

"""Adapters of PEFT train through the Trainer, merge, and answer the same before and after."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_earlyexit as ee
from hf_earlyexit.errors import TrainingError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name


def with_lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))


@pytest.mark.parametrize("objective", ["weighted", "distillation"])
def test_adapters_and_exits_learn_and_merge(trainer, arguments, tiny_model, rows, tmp_path, objective):
    base, data = tiny_model(), rows(20, seed=1)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    start = base.state_dict()[query].clone()
    wrapped = with_lora(base)
    before = {name: value.detach().clone() for name, value in wrapped.named_parameters()}
    run = trainer(wrapped, arguments(objective=objective, max_steps=6, learning_rate=1e-2))
    run.train()
    moved = {name for name, value in wrapped.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in wrapped.named_parameters() if value.requires_grad}
    assert any("lora_B" in name for name in moved)
    learned = {name.removeprefix("base_model.model.").partition(".modules_to_save")[0] for name in moved}
    assert {f"exit_heads.{layer}.classifier" for layer in (1, 2, 3)} | {"classifier"} <= learned
    assert "eval_exit_1_accuracy" in run.evaluate()

    wrapped.eval()
    sure = ee.collect_trace(wrapped, data, progress=False).logits[:, 0].softmax(-1).amax(-1).sort().values
    base.set_exit_policy(ee.ConfidencePolicy(thresholds=[float(sure[9:11].mean())] * 3))  # half leave at the first exit
    inputs = data.remove_columns("labels")
    adapted = ee.predict(wrapped, inputs)
    merged = wrapped.merge_and_unload().eval()
    assert isinstance(merged, ee.EarlyExitBertForSequenceClassification)
    plain = ee.predict(merged, inputs)
    torch.testing.assert_close(adapted.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert adapted.exit_layer.tolist() == plain.exit_layer.tolist()
    assert plain.exit_layer.tolist().count(1) == 10
    assert not torch.equal(merged.state_dict()[query], start)  # the adapters are in the weights now

    merged.save_pretrained(tmp_path / "merged")
    again = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(ee.predict(again, inputs).logits, plain.logits)


def test_exits_that_the_adapters_freeze_are_refused(trainer, tiny_model):
    with pytest.raises(TrainingError, match=r"PEFT has frozen exit_heads\.1.*modules_to_save=\['classifier', 'exit_heads"):
        trainer(with_lora(tiny_model(exit_head="pooler")))

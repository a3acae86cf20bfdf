"""Every family goes to the Hub and comes back by the Auto classes and by the stock class, in another process."""

import pytest

from hf_earlyexit.families import FAMILIES

COMMON = """
import torch, transformers
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.modeling.tasks import TASKS
from tests.families.calibrated import opened
from tests.families.tiny import batch_of, new_model, rows_of, stock_class
def answers(name, model, **options):
    with torch.inference_mode():
        return model(**batch_of(name, rows=24, padding="none"), **options)
"""

PUSH = f"""{COMMON}
for name in FAMILIES:
    model = new_model(name)
    trace = ee.collect_trace(model, rows_of(batch_of(name, rows=24)), labelled=False, progress=False)
    model.set_exit_policy(opened("confidence", trace))
    ee.push_to_hub(model, f"tester/{{name}}", card=False)
    early = answers(name, model)
    out[name] = [early.logits.tolist(), early.exit_layer.tolist(), answers(name, model, early_exit=False).logits.tolist()]
"""

PULL = f"""{COMMON}
for name, family in FAMILIES.items():
    auto = getattr(transformers, TASKS[family.task].auto_model)
    model, stock = auto.from_pretrained(f"tester/{{name}}"), stock_class(name).from_pretrained(f"tester/{{name}}").eval()
    early = answers(name, model)
    out[name] = [early.logits.tolist(), early.exit_layer.tolist(), answers(name, stock).logits.tolist()]
    out[name].append(type(model).__name__)
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_pushed_answers_and_leaves_as_before(name, hub, pushed, pulled):
    assert pulled[name][:3] == pushed[name]
    assert len(set(pushed[name][1])) > 1  # some leave early, and some do not
    assert pulled[name][3].startswith(f"EarlyExit{FAMILIES[name].name}For")
    commit = hub.repos[f"tester/{name}"].commits[1]
    assert {"config.json", "model.safetensors", "modeling_hf_earlyexit.py"} <= set(commit.files)

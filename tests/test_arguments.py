"""Arguments that cannot be are refused by name, in every function that takes them, whatever stands in their place."""

import math

import numpy as np
import pytest
import torch

import hf_earlyexit as ee

JUNK = (b"a", math.nan, 10**400, [], {"a": 1}, np.array([1, 2]))
FLAG = (*JUNK, "false", 0, 1)  # a string would count as true, and a zero is not False
NUMBER = (*JUNK, "one", -(2**70), 0.5, True)
SHARE = (*JUNK, "half", -0.5, 0, 1.5, True)
NAME = (*JUNK, "nobody", 1, True)
OBJECT = (*JUNK, "one", 1, True)
OF_PREDICT = {
    "early_exit": FLAG,
    "operating_point": NAME,
    "deadline": (*JUNK, "soon", -1),
    "layer_budget": NUMBER,
    "max_batch_tokens": NUMBER,
    "max_length": NUMBER,
    "errors": NAME,
    "cuda_graphs": FLAG,
    "progress": FLAG,
    "monitor": OBJECT,
}
OF_MONITOR = {
    "limit": (*SHARE, 1),
    "shadow": SHARE,
    "confidence": (*SHARE, 1),
    "window": (*NUMBER, 99),
    "reference": (*JUNK, (0.5, 0.5)),
    "fall_back": FLAG,
    "on_alarm": OBJECT,
    "seed": NUMBER,
    "operating_point": NAME,
}
OF_ENGINE = {
    "max_wait": (*JUNK, "long", -1),
    "max_queue": NUMBER,
    "max_batch_tokens": NUMBER,
    "max_length": NUMBER,
    "cuda_graphs": FLAG,
    "monitor": OBJECT,
}
OF_SUBMIT = {
    "early_exit": FLAG,
    "operating_point": NAME,
    "deadline": (*JUNK, "soon", -1),
    "layer_budget": NUMBER,
    "priority": (*JUNK, "high", None),
    "model": NAME,
}
OF_PIPELINE = {
    "early_exit": FLAG,
    "operating_point": NAME,
    "window": NUMBER,
    "cuda_graphs": FLAG,
    "monitor": OBJECT,
}
OF_GENERATE = {
    "early_exit": FLAG,
    "operating_point": NAME,
    "lossless": FLAG,
    "max_drafts": NUMBER,
    "return_exit_layers": FLAG,
}
OF_COLLECT = {
    "labels": (1, 0.5, True, np.array(1), "one"),
    "labelled": FLAG,
    "max_batch_tokens": NUMBER,
    "max_length": NUMBER,
    "progress": FLAG,
    "split": (*JUNK, 1),
}
OF_CALIBRATE = {
    "trace": OBJECT,
    "policy": NAME,
    "target": NAME,
    "metric": NAME,
    "per_exit": FLAG,
    "options": (*JUNK, "one", 1),
    "keep_weak_exits": FLAG,
    "min_leavers": NUMBER,
    "learning_share": (*SHARE, 1),
    "folds": NUMBER,
    "groups": (*JUNK, 1),
    "learned_from": OBJECT,
    "seed": (*JUNK, 2**63, 0.5, True),
}


@pytest.fixture(scope="module")
def served(tiny_model, open_policy, tokenizer):
    """A model with a policy, and all that takes arguments, by name."""
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    texts, labels = [f"w{5 + number % 90} w7" for number in range(60)], [number % 3 for number in range(60)]
    trace = ee.collect_trace(model, texts, labels=labels, tokenizer=tokenizer, progress=False)
    pipe = ee.pipeline("text-classification", model=model, tokenizer=tokenizer)
    writer = ee.EarlyExitGPT2LMHeadModel(ee.EarlyExitGPT2LMConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).eval()
    writer.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.5,)))
    prompt = {"inputs": torch.tensor([[1, 2, 3]]), "max_new_tokens": 2, "pad_token_id": 0, "lossless": True}
    few, taught = texts[:2], {"labels": labels[:2]}
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        yield {
            "predict": lambda **given: ee.predict(model, few, tokenizer=tokenizer, **given),
            "Monitor": lambda **given: ee.Monitor(model, **given),
            "Engine": lambda **given: ee.Engine(model, tokenizer=tokenizer, **given).close(),
            "submit": lambda **given: engine.submit("w5", **given).result(60),
            "pipeline": lambda **given: pipe(few, **given),
            "generate": lambda **given: writer.generate(**{**prompt, **given}),
            "collect_trace": lambda **given: ee.collect_trace(model, few, tokenizer=tokenizer, **{**taught, **given}),
            "calibrate": lambda **given: ee.calibrate(**{"trace": trace, "keep_weak_exits": True, **given}),
        }


@pytest.mark.parametrize(
    ("name", "argument", "values"),
    [
        pytest.param(name, argument, tuple(values), id=f"{name}-{argument}")
        for name, arguments in (
            ("predict", OF_PREDICT),
            ("Monitor", OF_MONITOR),
            ("Engine", OF_ENGINE),
            ("submit", OF_SUBMIT),
            ("pipeline", OF_PIPELINE),
            ("generate", OF_GENERATE),
            ("collect_trace", OF_COLLECT),
            ("calibrate", OF_CALIBRATE),
        )
        for argument, values in arguments.items()
    ],
)
def test_what_cannot_be_is_refused(served, name, argument, values):
    assert values
    for value in values:
        with pytest.raises(ee.EarlyExitError) as caught:
            served[name](**{argument: value})
        assert len(str(caught.value)) < 1000, value


@pytest.mark.parametrize(
    "name", ["predict", "Monitor", "Engine", "submit", "pipeline", "generate", "collect_trace", "calibrate"]
)
def test_none_of_them_stands_in_the_way(served, name):
    served[name]()

"""A tiny model, its tokenizer and its calibrations, made alike in every process."""

import torch
from transformers import BertTokenizer

import hf_earlyexit as ee
from hf_earlyexit.modeling.fingerprint import model_fingerprint
from tests.conftest import SHAPE, VOCABULARY


def texts(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    words = [torch.randint(5, len(VOCABULARY), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(f"w{number}" for number in numbers) for numbers in words]


def make_tokenizer():
    return BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, model_max_length=64)


def make_model(seed=0, **fields):
    torch.manual_seed(seed)
    model = ee.EarlyExitBertForSequenceClassification(ee.EarlyExitBertConfig(**{**SHAPE, **fields})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("exit_heads.", "classifier.")):
                weight.normal_(0, 1.0 if weight.ndim == 2 else 0.1)
    return model


CALIBRATED = {}


def calibrate(model, budgets=(2.0, 3.0)):
    """One result for each budget of layers; the same model is calibrated once."""
    key = (model_fingerprint(model), *budgets)
    if key not in CALIBRATED:
        CALIBRATED[key] = calibrate_anew(model, budgets)
    return list(CALIBRATED[key])


def calibrate_anew(model, budgets):
    rows, tokenizer = texts(200, seed=9), make_tokenizer()
    labels = ee.predict(model, rows, tokenizer=tokenizer, early_exit=False).logits.argmax(-1).tolist()
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    return [ee.calibrate(trace, "confidence", ee.LayerBudget(budget), keep_weak_exits=True) for budget in budgets]


def make_all(seed=0):
    """Model with the operating points "fast" and "balanced", the latter by default; tokenizer; results by name."""
    model = make_model(seed)
    results = dict(zip(("fast", "balanced"), calibrate(model), strict=True))
    model.set_operating_points(results, default="balanced")
    return model, make_tokenizer(), results


def told(model, tokenizer=None, point=None):
    """What a model answers to all texts, as plain values: labels, exit layers."""
    answers = ee.predict(model, texts(), tokenizer=tokenizer or make_tokenizer(), operating_point=point)
    return [answers.logits.argmax(-1).tolist(), answers.exit_layer.tolist()]

"""Models traced once for all tests of the export."""

from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from hf_earlyexit.onnx.classifier import OnnxClassifier
from hf_earlyexit.onnx.export import one_file
from hf_earlyexit.onnx.layer_files import cut_pieces
from hf_earlyexit.onnx.quantize import quantize_graph
from hf_earlyexit.onnx.walk import walk_graph
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION

MODELS = {
    "single": {"exit_gate": "mlp+logits"},
    "multi": {"problem_type": MULTI_LABEL, "exit_layers": [1, 2, 4], "exit_head": "linear"},
    "regression": {"num_hidden_layers": 3, "problem_type": REGRESSION, "num_labels": 1, "exit_head": "pooler"},
}


@pytest.fixture(scope="session")
def traced(tiny_model):
    """`traced(name, int8=False)`: torch model, whole graph and OnnxClassifier of one of `MODELS`; traced once."""
    known = {}

    def make(name="single", int8=False):
        if (name, False) not in known:
            model = tiny_model(**MODELS[name])
            plain = walk_graph(model, model.signals)
            for is_int8, whole in ((False, plain), (True, quantize_graph(plain))):
                known[name, is_int8] = SimpleNamespace(model=model, plain=plain, whole=whole, int8=is_int8)
        found = known[name, int8]
        found.config = type(found.model.config)(**found.model.config.to_dict())
        pieces = cut_pieces(found.whole, found.config)
        found.onnx = OnnxClassifier(found.config, pieces.__getitem__, "fp", "int8" if int8 else "float32", threads=1)
        return found

    return make


@pytest.fixture(scope="session")
def one_row_session():
    """`one_row_session(traced, policy)`: the one-file form in ONNX Runtime; call it with token ids."""

    def make(found, policy, **options):
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        for name, value in options.items():
            setattr(settings, name, value)
        data = one_file(found.plain, found.config, policy, found.int8)
        return ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])

    return make


def feeds(row):
    """A row's token ids as the one-file form takes them."""
    ids = np.array([row["input_ids"]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.array([row["token_type_ids"]])}

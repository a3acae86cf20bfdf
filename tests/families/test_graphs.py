"""Families that need no ONNX files of their own or make none, and states and attentions. See tests/onnx/test_laws.py."""

import ast
from dataclasses import replace
from importlib import import_module
from inspect import getsource

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from hf_earlyexit.families import FAMILIES

from .tiny import batch_of, new_model, stock_of, tiny

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is missing, which runs the exported graphs (extra: onnx)")
ALIKE = {"camembert": "Camembert", "xlm-roberta": "XLMRoberta"}  # roberta under another name


@pytest.mark.parametrize("name", ALIKE)
def test_a_family_that_is_another_under_another_name_needs_no_files_of_its_own(name):
    """Every part that a graph is traced from is the same code."""

    def code(family, prefix, part):
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        source = getsource(getattr(module, prefix + part)).replace(prefix, "Roberta").replace(family, "roberta")
        return ast.dump(ast.parse(source))  # without comments

    for part in ("Embeddings", "SelfAttention", "SelfOutput", "Attention", "Intermediate", "Output", "Layer", "Pooler"):
        assert code(name.replace("-", "_"), ALIKE[name], part) == code("roberta", "Roberta", part)
    assert replace(FAMILIES[name], name="Roberta") == FAMILIES["roberta"]


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].untraced])
def test_families_that_make_no_graph_are_refused_with_the_reason(name, tmp_path):
    with pytest.raises(UsageError, match=f"{FAMILIES[name].name} models cannot be exported: "):
        ee.export_onnx(tiny(name), tmp_path / "out", forms=["layers"])


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_attentions_are_those_of_the_stock_model(name):
    model, batch = new_model(name, attn_implementation="eager"), batch_of(name)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.inference_mode():
        found, expected = model(**batch, **asked, labels=torch.zeros(6).long()), stock_of(model, name)(**batch, **asked)
        plain = model(**batch)
    for part in ("hidden_states", "attentions"):
        assert len(found[part]) == len(expected[part]) > 0
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[part], expected[part], strict=True))
    assert plain.hidden_states is None
    assert not hasattr(plain, "last_hidden_state")
    assert "last_hidden_state" not in found

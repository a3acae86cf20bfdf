"""Importing the package is cheap, and transformers knows its models all the same, whichever is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import python

ROOT = Path(__file__).resolve().parents[1]
KNOWS = """
from transformers import AutoConfig
assert AutoConfig.for_model("early_exit_bert").model_type == "early_exit_bert"
"""
KNOWS_CLASS = """
from transformers import AutoModelForSequenceClassification as auto
small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
name = type(auto.from_config(AutoConfig.for_model("early_exit_bert", **small))).__name__
assert name == "EarlyExitBertForSequenceClassification", name
"""
KNOWS_TASK = """
from transformers.pipelines import PIPELINE_REGISTRY
assert "early-exit-captioning" in PIPELINE_REGISTRY.get_supported_tasks()
"""


def run(code):
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, hf_earlyexit; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'too much'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=True)


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_earlyexit",
        "from transformers import AutoConfig; import hf_earlyexit",
        "import hf_earlyexit; from transformers import VisionEncoderDecoderModel",  # half loaded when Auto classes are
        "import hf_earlyexit; hf_earlyexit.EarlyExitBertConfig",
    ],
)
def test_transformers_knows_whichever_comes_first(imports):
    run(f"{imports}\n{KNOWS}\n{KNOWS_CLASS}\n{KNOWS_TASK}")


def test_the_watch_ends_with_its_work_and_leaves_loaders_as_they_were(tmp_path):
    (tmp_path / "outer.py").write_text("import watched.inner\n")
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "__init__.py").write_text("")
    (tmp_path / "watched" / "inner.py").write_text("import watched.wanted\nready = True\n")
    (tmp_path / "watched" / "wanted.py").write_text("")
    (tmp_path / "watched" / "broken.py").write_text("import watched.wanted\nraise RuntimeError('on purpose')\n")
    run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from hf_earlyexit.after_import import after_import
before, calls = list(sys.meta_path), []
after_import("watched.wanted", lambda: calls.append(getattr(sys.modules.get("watched.inner"), "ready", None)))
try:
    import watched.broken
except RuntimeError as error:
    assert str(error) == "on purpose"
assert calls == [], "not in the middle of an error"
import outer
assert calls == [True], calls
assert sys.meta_path == before
assert type(sys.modules["watched.inner"].__loader__).__name__ == "SourceFileLoader"
loaders = [vars(module.__loader__) for name, module in sys.modules.items() if name.startswith("watched")]
assert len(loaders) == 3 and not any("exec_module" in loader for loader in loaders)
after_import("watched.wanted", lambda: calls.append("at once"))
assert calls == [True, "at once"]
""")

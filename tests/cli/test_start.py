"""Help costs no model."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from hf_earlyexit.cli.main import COMMANDS, main
from hf_earlyexit.cli.train import MORE

ROOT = Path(__file__).resolve().parents[2]
LISTS = """
import builtins, contextlib, io, sys
{before}
from hf_earlyexit.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as told:
    try:
        assert main({words!r}) == 0
    except SystemExit as stop:
        assert stop.code == 0
heavy = {{"torch", "datasets", "pandas", "pyarrow", "matplotlib", "sklearn", "accelerate", "onnx"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
models = [name for name in sys.modules if name.startswith("transformers.models.")]
assert not models, models
print(told.getvalue())
"""


def run(words, before=""):
    code = LISTS.format(words=words, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_of_every_command_imports_neither_torch_nor_models_nor_extras():
    # all in one process: what one of them imported would still be there
    words = [[], *([name] for name in COMMANDS.names())]
    code = "\n".join(LISTS.format(words=[*one, "--help"], before="") for one in words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS.names():
        assert f"usage: hf-earlyexit {name}" in done.stdout


def test_the_overview_imports_no_transformers():
    assert "calibrate" in run(["--help"], before="sys.modules['transformers'] = None")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"hf-earlyexit {version('hf_earlyexit')}\n"


def test_help_of_training_is_short_and_all_of_it_can_be_asked_for(capsys):
    def told(flag):
        with pytest.raises(SystemExit) as stop:
            main(["train", flag])
        assert stop.value.code == 0
        return capsys.readouterr().out

    short, full = told("--help"), told("--help_all")
    assert "--help_all lists them all" in short
    assert "--weight_decay" not in short
    assert "--weight_decay" in full
    for word in MORE.replace(",", " ").replace(";", " ").split():
        if word.startswith("--") and word != "--help_all":
            assert word in full, f"{word} is promised, but is no flag"

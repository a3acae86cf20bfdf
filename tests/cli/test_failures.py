"""A mistake is told in one message and ends with status 2; only a bug shows where it happened."""

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from hf_earlyexit.cli import env, failures
from hf_earlyexit.cli.failures import EXTRAS, end_of
from hf_earlyexit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def broken(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(env, "run", run)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "hf-earlyexit env: interrupted."),
        (OSError(errno.ENOSPC, "No space left on device", "answers.csv"), 2, "answers.csv: No space left on device"),
        (OSError("x is no folder\nIf this is private,\nlog in"), 2, "x is no folder If this is private, log in"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "smaller --max_batch_tokens"),
        (MemoryError(), 2, "smaller --max_batch_tokens"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 2, '"hf_earlyexit[report]"'),
        (ModuleNotFoundError("No module named 'onnxscript.x'", name="onnxscript.x"), 2, '"hf_earlyexit[onnx]"'),
        (ImportError("Using the `Trainer` requires `accelerate>=1.1.0`"), 2, '"hf_earlyexit[train]"'),
    ],
)
def test_what_is_no_bug_ends_in_one_message(error, status, message, monkeypatch, capsys):
    broken(monkeypatch, error)
    assert main(["env"]) == status
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.count("\n") == 1
    with pytest.raises(type(error)):
        main(["env", "--traceback"])


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), AttributeError("x"), ModuleNotFoundError("No module named 'hf_earlyexit.x'", name="hf_earlyexit.x")],
)
def test_a_bug_is_raised_and_says_that_it_is_one(error, monkeypatch):
    broken(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        main(["env"])
    assert "This is a bug" in caught.value.__notes__[0]


def test_every_extra_that_is_named_holds_what_was_missing():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {
        "sklearn": "scikit-learn",
        "PIL": "pillow",
        "scipy": "scikit-learn",
        "pandas": "datasets",
        "pyarrow": "datasets",
        "prometheus_client": "prometheus-client",
    }
    for module, extra in EXTRAS.items():
        assert any(line.startswith(packages.get(module, module)) for line in extras[extra]), f"{module} is not in [{extra}]"


def test_a_reader_that_has_gone_is_no_mistake(monkeypatch):
    with open(os.devnull, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert end_of(BrokenPipeError(), "predict") == (failures.READER_GONE, ())


def test_settings_that_this_machine_has_not_are_refused_in_words(capsys):
    words = ["train", "x", "--dataset", "y", "--output_dir", "z", "--tf32", "true"]
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which takes tf32 and bf16; what is shown are the words of a machine without")
    assert main(words) == 2
    assert "tf32 requires" in capsys.readouterr().err
    assert main([*words[:-2], "--bf16"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("hf-earlyexit train: ")
    assert "bf16" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "required: --model, --input. See hf-earlyexit predict --help."),
        (["bench", "x", "--input", "y", "--rows", "many"], "invalid int value: 'many'"),
        (["env", "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_flags_that_cannot_be_read_are_told_in_one_line(words, message, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_head_ends_a_stream_without_a_word(tmp_path):
    code = "import sys; from hf_earlyexit.cli import command_result, env, main\n"
    code += "env.run = lambda args: command_result.CommandResult({}, lines=({'row': n} for n in range(10**7)))\n"
    code += "sys.exit(main.main(['env']))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.readline() == b'{"row": 0}\n'
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141

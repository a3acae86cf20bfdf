"""Processes of a test's own, forked from one that has imported torch already, which takes longest."""

import os
import subprocess
import sys
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.tensor", "pandas", "pyarrow", "sklearn.metrics"])


def started(function, *words) -> BaseProcess:
    """A process that calls a function of a module with some arguments; what it prints goes nowhere."""
    return _start(_call, os.devnull, os.devnull, function, words)


def python(code, *words, cwd, environment=None, timeout=300) -> subprocess.CompletedProcess:
    """What `python -c code words` would have done: exit status and output.

    transformers, huggingface_hub and this package are imported anew, by the environment that is given.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _start(
            _execute, out, err, code, words, os.fspath(cwd), dict(os.environ if environment is None else environment)
        )
        process.join(timeout)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(["-c", *words], process.exitcode, out.read_text(), err.read_text())


def _start(function, out, err, *arguments) -> BaseProcess:
    process = FORKED.Process(target=_redirected, args=(function, out, err, *arguments), daemon=True)
    process.start()
    return process


def _redirected(function, out, err, *arguments):
    import torch

    torch.set_num_threads(1)
    for number, path in ((1, out), (2, err)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    function(*arguments)


def _call(function, words):
    function(*words)


def _execute(code, words, cwd, environment):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

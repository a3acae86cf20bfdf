"""Processes that a test starts to kill, forked from one that has imported already what takes long."""

import os
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(["hf_earlyexit.training.consistent", "datasets"])


def started(function, *words) -> BaseProcess:
    """A process that calls a function of a module with some arguments; what it prints goes nowhere."""
    process = FORKED.Process(target=_quietly, args=(function, *words), daemon=True)
    process.start()
    return process


def _quietly(function, *words):
    import torch

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    function(*words)

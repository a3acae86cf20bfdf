"""Print what a bug report needs: versions, threads and devices. Nothing in it names you or your machine.

    hf-earlyexit env

Paste it under what went wrong.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from ..versions import installed_version
from .command_result import CommandResult

PACKAGES = (
    "hf_earlyexit",
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "accelerate",
    "datasets",
    "evaluate",
    "scikit-learn",
    "jinja2",
    "matplotlib",
)


@dataclass
class EnvArguments:
    """None."""


ARGUMENTS = (EnvArguments,)


def run(args: EnvArguments) -> CommandResult:
    """Look around."""
    import torch

    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: installed_version(name) or "not installed" for name in PACKAGES},
        "torch threads": torch.get_num_threads(),
        "devices": ", ".join(["cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))]),
    }
    return CommandResult(facts, "\n".join(f"{name:16s} {value}" for name, value in facts.items()))

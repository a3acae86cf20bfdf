"""Print what a bug report needs: versions, threads and devices. Nothing in it names you or your machine.

    hf-earlyexit env

Paste it under what went wrong.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
    versions = environment()
    return CommandResult(versions, "\n".join(f"{name:16s} {value}" for name, value in versions.items()))


def environment() -> dict[str, Any]:
    """Versions, threads and devices by name."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "torch threads": torch.get_num_threads(),
        "devices": ", ".join(["cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""Which saved state of an interrupted run can be trusted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from ..errors import CheckpointError

# Trainer writes its state last, so a whole one says that the rest is there
TRAINER_STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"
RNG_STATES = "rng_state*.pth"

logger = logging.get_logger(__name__)


def newest_complete_checkpoint(folder: str | Path, parameters: Iterable[Tensor] = ()) -> Path | None:
    """The newest `checkpoint-N` of a `Trainer` run from which training goes on as if it had not stopped, or `None`.

    Newer ones that were cut off, damaged or overwritten are named in a warning, with the file at fault, and passed over.

    Args:
        folder: of the run.
        parameters: what is trained, to tell an optimizer's state of another model; nothing to leave that out.
    """
    parameters = list(parameters)
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = _missing(path) or _damaged(path, parameters)
        if fault is None:
            return path
        logger.warning(
            f"{path} was cut off while it was written, or damaged since ({fault}); training resumes from an older state."
        )
    return None


def check_checkpoint(path: str | Path, parameters: Iterable[Tensor] = ()) -> None:
    """Refuse a checkpoint that was asked for by name and holds a damaged or foreign file; warn where one is missing.

    Raises:
        CheckpointError: naming the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint is {str(path)!r}, which is no folder; expected a checkpoint-N folder, or True for the "
            "newest.",
            field="resume_from_checkpoint",
            path=path,
        )
    fault = _damaged(path, list(parameters))
    if fault is not None:
        raise CheckpointError(
            f"{path} cannot be taken up ({fault}); name an older checkpoint, or pass resume_from_checkpoint=True for the "
            "newest that is whole.",
            field="resume_from_checkpoint",
            path=path,
        )
    if (lost := _missing(path)) is not None:
        logger.warning(f"{path} is not whole ({lost}): training goes on from it, but not as if it had never stopped.")


def _missing(path: Path) -> str | None:
    """Which files a checkpoint lacks, in words; `None` if none."""
    lost = [name for name in (TRAINER_STATE, OPTIMIZER, SCHEDULER) if not (path / name).is_file()]
    lost += [] if list(path.glob("*.safetensors")) else ["weights"]
    lost += [] if list(path.glob(RNG_STATES)) else ["rng_state.pth"]
    return f"no {', '.join(lost)}" if lost else None


def _damaged(path: Path, parameters: list[Tensor]) -> str | None:
    """What is wrong with the files that a checkpoint has, in words; `None` if nothing."""
    checks: list[tuple[Path, Callable[[Path], None]]] = [(path / TRAINER_STATE, _check_state)]
    checks += [(file, _check_weights) for file in sorted(path.glob("*.safetensors"))]
    checks += [(path / OPTIMIZER, lambda file: _check_optimizer(file, parameters)), (path / SCHEDULER, _check_scheduler)]
    checks += [(file, _check_rng) for file in sorted(path.glob(RNG_STATES))]
    for file, check in checks:
        if not file.is_file():
            continue
        try:
            check(file)
        except Exception as error:  # a damaged pickle or JSON can raise anything
            return f"{file.name}: {_in_short(error)}"
    return None


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()).split(". ")[0]
    return text[:200] or ("the file is empty" if type(error) is EOFError else type(error).__name__)


def _check_state(file: Path) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not isinstance(values.get("global_step"), int):
        raise ValueError("it is not the state of a Trainer")
    step = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
    if step and values["global_step"] != int(step[1]):
        raise ValueError(f"it was written at step {values['global_step']}, the folder is that of step {step[1]}")
    TrainerState.load_from_json(str(file))


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read(file: Path) -> Any:
    if not file.stat().st_size:
        raise EOFError
    with safe_globals():  # as Trainer reads them: no code of the file is run
        return torch.load(file, map_location="cpu", weights_only=True)


def _require(values: Any, names: Iterable[str], what: str) -> None:
    if not isinstance(values, dict) or not set(names) <= values.keys():
        raise ValueError(f"it is not the state of {what}")


def _check_optimizer(file: Path, parameters: list[Tensor]) -> None:
    values = _read(file)
    _require(values, ("state", "param_groups"), "an optimizer")
    if not parameters:
        return
    count = sum(len(group["params"]) for group in values["param_groups"])
    if count != len(parameters):
        raise ValueError(f"it is for {count} tensors, this run trains {len(parameters)}")
    sizes = Counter(tuple(state["exp_avg"].shape) for state in values["state"].values() if "exp_avg" in state)
    if other := sizes - Counter(tuple(parameter.shape) for parameter in parameters):
        raise ValueError(f"it is for tensors of other shapes, such as {list(next(iter(other)))}")


def _check_scheduler(file: Path) -> None:
    _require(_read(file), ("last_epoch",), "a scheduler")


def _check_rng(file: Path) -> None:
    values = _read(file)
    _require(values, ("python", "numpy", "cpu"), "the random generators")
    torch.Generator().set_state(values["cpu"])

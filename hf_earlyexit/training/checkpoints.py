"""Which saved state of an interrupted run can be trusted."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

# Trainer writes its state last, so a whole one says that the rest is there
TRAINER_STATE = "trainer_state.json"
NEEDED = ("optimizer.pt", "scheduler.pt")

logger = logging.get_logger(__name__)


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest `checkpoint-N` of a `Trainer` run that was written to its end, or `None`.

    Newer ones that were cut off are named in a warning and passed over.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning(f"{path} was cut off while it was written ({fault}); training resumes from an older state.")
    return None


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; `None` if nothing."""
    try:
        json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{TRAINER_STATE}: {error}"
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        return "no weights"
    for file in weights:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (OSError, SafetensorError) as error:
            return f"{file.name}: {error}"
    lost = [name for name in NEEDED if not (path / name).is_file()]
    lost += [] if list(path.glob("rng_state*.pth")) else ["rng_state.pth"]
    return f"no {', '.join(lost)}" if lost else None

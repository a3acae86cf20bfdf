"""What a run that pushes its checkpoints must carry along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..modeling.shim import write_shim


class CarryShim(TrainerCallback):
    """`Trainer` copies config and weights of a checkpoint before it pushes, but not the file the config points to."""

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Write that file beside them."""
        write_shim(Path(args.output_dir), type(model.config).__name__, model.config.door)

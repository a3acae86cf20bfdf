"""Weights of a checkpoint, taken up by the names that models have in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..modeling.protocol import TorchExitModel
from .settings import has_adapters


def load_weights(model: TorchExitModel, folder: str | Path) -> None:
    """Give a model the weights of a folder that its `save_pretrained` wrote.

    Transformers saves some families, most image models among them, under the names of older releases. `Trainer` reads files
    as they are and would pass over all tensors of such names; this reads them as `from_pretrained` does.

    Raises:
        CheckpointError: for a folder that does not fit the model, or is damaged.
    """
    read = type(model).from_pretrained(folder, ignore_certificate=True)
    model.load_state_dict(read.state_dict())


class WeightsByName:
    """Part of a `Trainer` that takes weights up by `load_weights`, when it resumes and when it ends with the best."""

    exit_model: TorchExitModel
    state: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._reads_itself(resume_from_checkpoint):
            load_weights(self.exit_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if self._reads_itself(self.state.best_model_checkpoint):
            load_weights(self.exit_model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _reads_itself(self, folder: str) -> bool:
        """Whether a folder holds the whole model in safetensors."""
        return not has_adapters(self.exit_model) and any(Path(folder).glob("model*.safetensors"))

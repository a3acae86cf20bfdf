"""A row that comes alone, through the one file that stops by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from threading import Lock
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from ..policies.base import ExitPolicy

OUTPUTS = ["logits", "exit_layer", "exit_score"]


class OneRow:
    """The one-file form of an export, opened when the first row comes; threads may share it.

    It holds the weights once more, and takes a call to the runtime where the layers' files take two at every exit.

    Args:
        open_file: opens it.
        policy: that the file holds, as in the config it was written with; `values` afterwards.
    """

    def __init__(self, open_file: Callable[[], ort.InferenceSession], policy: dict[str, Any]) -> None:
        self.values = policy
        self._open_file, self._opening = open_file, Lock()
        self._session: ort.InferenceSession | None = None

    @cached_property
    def policy(self) -> ExitPolicy:
        """That the file holds."""
        return ExitPolicy.from_dict(self.values)

    def __call__(self, row: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[1, C]`, exit layer `[1]` and exit score `[1]` of a batch of one row, by the names of the inputs."""
        with self._opening:
            self._session = self._session or self._open_file()
        answer = self._session.run(OUTPUTS, {name: values.numpy() for name, values in row.items()})
        logits, layer, score = map(torch.from_numpy, answer)
        return logits, layer, score

"""Every exit's signals for a set of rows: what calibration reads instead of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from .errors import CheckpointError, DataError
from .files import read_tensors, write_file
from .policies.base import ExitSignal
from .problem_types import PROBLEM_TYPES, SINGLE_LABEL, majority_quality, row_quality

FORMAT = "hf_earlyexit.trace/1"


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTrace:
    """Signals of N rows at E exits, from one full pass through a model.

    Args:
        logits: `[N, E, C]`, float32.
        labels: `[N]` class numbers, or `[N, C]` values for many labels and regression.
        exit_layers: layer (1-based) of each exit, ascending; the last is the number of layers.
        problem_type: what the labels mean.
        split: the rows' origin, such as "held-back"; "train" marks rows the exits were trained on.
        gates: leave logits `[N, E - 1]` or `None`.
        similarities: cosine of the states before and after each exit's layer `[N, E]`, or `None`.
        cost: cost of leaving at each exit, in layers; `None` for the layers' numbers.
        fingerprint: of the model that made the logits; empty if unknown.
        meta: anything else worth keeping, JSON values (dtype, model name, library versions).

    Raises:
        DataError: if the shapes do not fit each other, or a logit is not finite.
    """

    logits: Tensor
    labels: Tensor
    exit_layers: tuple[int, ...]
    problem_type: str = SINGLE_LABEL
    split: str = "held-back"
    gates: Tensor | None = None
    similarities: Tensor | None = None
    cost: tuple[float, ...] | None = None
    fingerprint: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        if self.logits.ndim != 3 or self.logits.shape[1] != len(self.exit_layers):
            raise DataError(
                f"logits has shape {list(self.logits.shape)}; expected [rows, {len(self.exit_layers)} exits, classes].",
                field="logits",
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise DataError(
                f"problem_type is {self.problem_type!r}; expected one of {', '.join(PROBLEM_TYPES)}.",
                field="problem_type",
                value=self.problem_type,
            )
        if not all(low < high for low, high in pairwise((0, *self.exit_layers))):
            raise DataError(
                f"exit_layers is {self.exit_layers}; expected layer numbers from 1, ascending.",
                field="exit_layers",
                value=self.exit_layers,
            )
        if self.cost is not None and (len(self.cost) != self.num_exits or not all(map(math.isfinite, self.cost))):
            raise DataError(
                f"cost is {self.cost}; expected {self.num_exits} finite numbers, one per exit.",
                field="cost",
                value=self.cost,
            )
        for name, values, exits in self._beside():
            if values is not None and values.shape != (self.num_rows, exits):
                raise DataError(f"{name} has shape {list(values.shape)}; expected [{self.num_rows}, {exits}].", field=name)
        if self.labels.shape[0] != self.num_rows:
            raise DataError(f"{self.labels.shape[0]} labels for {self.num_rows} rows; expected one a row.", field="labels")
        if not bool(torch.isfinite(self.logits).all()):
            row = int((~torch.isfinite(self.logits)).flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"Row {row} has a logit that is not finite; check the model's weights and dtype.", field="logits"
            )
        if self.problem_type != SINGLE_LABEL and self.labels.numel() != self.num_rows * self.logits.shape[-1]:
            raise DataError(
                f"labels has shape {list(self.labels.shape)}; expected [{self.num_rows}, {self.logits.shape[-1]}].",
                field="labels",
            )
        if not bool(torch.isfinite(self.labels).all()):
            row = int((~torch.isfinite(self.labels)).reshape(self.num_rows, -1).any(1).nonzero()[0])
            raise DataError(f"Row {row} has a label that is not finite; leave it out.", field="labels")
        if self.problem_type == SINGLE_LABEL and self.num_rows:
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= self.logits.shape[-1]:
                raise DataError(
                    f"Labels run from {low} to {high}; expected 0 to {self.logits.shape[-1] - 1}.", field="labels"
                )

    def _beside(self) -> tuple[tuple[str, Tensor | None, int], ...]:
        """What there may be beside the logits: name, values, number of exits."""
        return ("gates", self.gates, self.num_exits - 1), ("similarities", self.similarities, self.num_exits)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.logits.shape[0]

    @property
    def num_exits(self) -> int:
        """E, the last exit included."""
        return self.logits.shape[1]

    @property
    def costs(self) -> tuple[float, ...]:
        """Cost of leaving at each exit, in layers."""
        return tuple(float(layer) for layer in self.exit_layers) if self.cost is None else self.cost

    @property
    def quality(self) -> Tensor:
        """Quality of each exit on each row, `[N, E]`: see `problems.row_quality`."""
        return row_quality(self.logits, self.labels, self.problem_type)

    def signal(self, exit_index: int) -> ExitSignal:
        """What exit `exit_index` (0-based) told about every row."""
        beside = (
            None if values is None or exit_index == exits else values[:, exit_index] for _, values, exits in self._beside()
        )
        return ExitSignal(self.logits[:, exit_index], *beside)

    def select(self, rows: Tensor | Sequence[int]) -> ExitTrace:
        """The trace of some rows, in the given order."""
        index = torch.as_tensor(rows)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        beside = {name: None if values is None else values[index] for name, values, _ in self._beside()}
        return ExitTrace(**{**vars(self), "logits": self.logits[index], "labels": self.labels[index], **beside})

    def dead_exits(self, sigmas: float = 1.645) -> tuple[int, ...]:
        """Exits (0-based, the last excepted) that are no better than always giving the most frequent answer.

        Args:
            sigmas: how many standard errors of its mean quality an exit must be above the constant answer to count as alive.
        """
        if self.num_exits == 1:
            return ()
        constant = majority_quality(self.labels, self.problem_type)
        quality = self.quality[:, :-1]
        noise = quality.std(0, correction=0) / max(self.num_rows, 1) ** 0.5
        return tuple((quality.mean(0) <= constant + sigmas * noise).nonzero().flatten().tolist())

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file."""
        tensors = {"logits": self.logits.contiguous(), "labels": self.labels.contiguous()}
        beside = {name: values for name, values, _ in self._beside()}
        tensors |= {name: values.contiguous() for name, values in beside.items() if values is not None}
        plain = {name: value for name, value in vars(self).items() if name not in ("logits", "labels", *beside)}
        write_file(path, save(tensors, metadata={"format": FORMAT, "trace": json.dumps(plain)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ExitTrace:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is damaged or not a trace.
        """
        try:
            meta, tensors = read_tensors(path, FORMAT)
            plain = json.loads(meta["trace"])
            plain["cost"] = None if plain["cost"] is None else tuple(plain["cost"])
            return cls(**plain, **tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:  # JSON and data errors are ValueErrors
            raise CheckpointError(
                f"{path} is not an exit trace, or cannot be read as one ({error}); collect the trace again.", path=path
            ) from error

"""Every exit's signals for a set of rows: what calibration reads instead of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError, DataError
from .files import read_tensors, write_tensors
from .problem_types import PROBLEM_TYPES, SINGLE_LABEL, majority_quality, row_quality
from .signals import SIGNALS, ExitSignal
from .values import check_choice, check_layers, is_real, plain, shown

FORMAT = "hf_earlyexit.trace/1"
SCALAR = "scalars."  # before the names of signals in a file


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTrace:
    """Signals of N rows at E exits, from one full pass through a model.

    Args:
        logits: `[N, E, C]`, float32.
        labels: `[N]` class numbers, or `[N, C]` values for many labels and regression.
        exit_layers: layer (1-based) of each exit, ascending; the last is the number of layers.
        problem_type: what the labels mean.
        split: the rows' origin, such as "held-back"; "train" marks rows the exits were trained on.
        scalars: what exits tell beside their logits, by the names of `SIGNALS`: `[N, E]`, or `[N, E - 1]` of signals that
            the last exit does not give, such as leave logits of gates.
        cost: cost of leaving at each exit, in layers; `None` for the layers' numbers.
        labelled: False where nobody gave labels, and those of the full model stand in for them: quality is then agreement.
        fingerprint: of the model that made the logits; empty if unknown.
        meta: anything else worth keeping, JSON values (dtype, model name, library versions).

    Raises:
        DataError: if shapes or types do not fit each other, a number is not finite, or cost does not ascend from above 0.
        UnknownNameError: for a signal that no registry holds.
    """

    logits: Tensor
    labels: Tensor
    exit_layers: tuple[int, ...]
    problem_type: str = SINGLE_LABEL
    split: str = "held-back"
    scalars: dict[str, Tensor] = field(default_factory=dict)
    cost: tuple[float, ...] | None = None
    labelled: bool = True
    fingerprint: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = plain(self.exit_layers)
        object.__setattr__(self, "exit_layers", tuple(layers) if isinstance(layers, Iterable) else layers)
        _check_plain(self)
        for name, values in {"logits": self.logits, "labels": self.labels, **self.scalars}.items():
            if not isinstance(values, Tensor):
                raise DataError(f"{name} is {shown(values)}; expected a tensor.", field=name)
        if self.logits.ndim != 3 or self.logits.shape[1] != len(self.exit_layers):
            raise DataError(
                f"logits has shape {list(self.logits.shape)}; expected [rows, {len(self.exit_layers)} exits, classes].",
                field="logits",
            )
        object.__setattr__(self, "scalars", dict(self.scalars))
        for name, values in self.scalars.items():
            exits = self.num_exits - (not SIGNALS.get(name).at_last)
            if values.shape != (self.num_rows, exits):
                raise DataError(f"{name} has shape {list(values.shape)}; expected [{self.num_rows}, {exits}].", field=name)
        _check_labels(self.labels, self.num_rows, self.logits.shape[-1], self.problem_type)
        for name, values in {"logits": self.logits, **self.scalars}.items():
            if not values.is_floating_point():
                raise DataError(f"{name} are {values.dtype}; expected float32.", field=name)
            if values.numel() and not all(map(math.isfinite, map(float, values.aminmax()))):  # nan is handed on; no copy
                row = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
                raise DataError(
                    f"Row {row} has a value in {name} that is not finite; check the model's weights and dtype.", field=name
                )

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
        """Quality of each exit on each row, `[N, E]`: see `problem_types.row_quality`."""
        return row_quality(self.logits, self.labels, self.problem_type)

    def signal(self, exit_index: int) -> ExitSignal:
        """What exit `exit_index` (0-based) told about every row."""
        scalars = {name: values[:, exit_index] for name, values in self.scalars.items() if exit_index < values.shape[1]}
        return ExitSignal(self.logits[:, exit_index], scalars)

    def row_values(self, of_logits: Callable[[Tensor], tuple[Tensor, ...]], exit_index: int) -> tuple[Tensor, ...]:
        """What a function makes of each row's logits at an exit `[N, C]`; it looks at every row by itself."""
        return of_logits(self.logits[:, exit_index])

    def select(self, rows: Tensor | Sequence[int]) -> ExitTrace:
        """The trace of some rows, in the given order."""
        index = torch.as_tensor(rows)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        scalars = {name: values[index] for name, values in self.scalars.items()}
        return ExitTrace(**{**vars(self), "logits": self.logits[index], "labels": self.labels[index], "scalars": scalars})

    def dead_exits(self, sigmas: float = 1.645) -> tuple[int, ...]:
        """Exits (0-based, the last excepted) that are no better than always giving the most frequent answer.

        Args:
            sigmas: how many standard errors of its mean quality an exit must be above the constant answer to count as alive.
        """
        return dead_exits(self.quality, self.labels, self.problem_type, sigmas)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file."""
        tensors = {"logits": self.logits, "labels": self.labels}
        plain = {name: value for name, value in vars(self).items() if name not in (*tensors, "scalars")}
        write_tensors(path, FORMAT, plain, tensors | {SCALAR + name: values for name, values in self.scalars.items()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ExitTrace:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is damaged, was changed, or is not a trace.
        """
        try:
            plain, tensors = read_tensors(path, FORMAT)
            cost = plain.get("cost")
            scalars = {name.removeprefix(SCALAR): tensors.pop(name) for name in list(tensors) if name.startswith(SCALAR)}
            return cls(**{**plain, "cost": tuple(cost) if isinstance(cost, list) else cost}, **tensors, scalars=scalars)
        except (OSError, SafetensorError, TypeError, ValueError) as error:  # data errors are ValueErrors
            raise CheckpointError(
                f"{path} is not an exit trace, or cannot be read as one ({error}); collect the trace again.",
                field=getattr(error, "field", None),
                path=path,
            ) from error


class SomeRows:
    """Rows that teach a policy, as `LearningRows`; the logits of an exit are taken out of the trace when they are asked for.

    Args:
        trace: all rows.
        places: of those that teach `[n]`.
        quality: of each exit on all rows `[N, E]`.
        row_values: as `ExitTrace.row_values`, of all rows, where they may be known already.
    """

    def __init__(
        self, trace: ExitTrace, places: Tensor, quality: Tensor, row_values: Callable[..., tuple[Tensor, ...]] | None = None
    ) -> None:
        self.trace, self.places, self._row_values = trace, places, row_values or trace.row_values
        self.problem_type, self.exit_layers, self.costs = trace.problem_type, trace.exit_layers, trace.costs
        self.num_rows, self.num_exits = len(places), trace.num_exits
        self.labels, self.quality = trace.labels[places], quality[places]
        self.scalars = {name: values[places] for name, values in trace.scalars.items()}

    @cached_property
    def logits(self) -> Tensor:
        """`[n, E, C]`."""
        return self.trace.logits[self.places]

    def signal(self, exit_index: int) -> ExitSignal:
        """See `ExitTrace.signal`."""
        of_all = self.trace.signal(exit_index)
        logits = of_all.logits.index_select(0, self.places)  # in half the time of an index, where exits lie side by side
        return ExitSignal(logits, {name: values[self.places] for name, values in of_all.scalars.items()})

    def row_values(self, of_logits: Callable[[Tensor], tuple[Tensor, ...]], exit_index: int) -> tuple[Tensor, ...]:
        """See `ExitTrace.row_values`."""
        return tuple(values.index_select(0, self.places) for values in self._row_values(of_logits, exit_index))

    def select(self, rows: Tensor | Sequence[int]) -> ExitTrace:
        """Some of these, in the given order."""
        return self.trace.select(self.places[torch.as_tensor(rows)])


def dead_exits(quality: Tensor, labels: Tensor, problem_type: str, sigmas: float = 1.645) -> tuple[int, ...]:
    """`ExitTrace.dead_exits`, from the quality of each exit on each row `[N, E]`."""
    if quality.shape[1] == 1:
        return ()
    constant = majority_quality(labels, problem_type)
    noise = quality[:, :-1].std(0, correction=0) / max(len(quality), 1) ** 0.5
    return tuple((quality[:, :-1].mean(0) <= constant + sigmas * noise).nonzero().flatten().tolist())


def _check_plain(trace: ExitTrace) -> None:
    """Refuse fields beside the tensors that cannot be."""
    check_choice(PROBLEM_TYPES, error=DataError, problem_type=trace.problem_type)
    layers = trace.exit_layers
    check_layers(layers, DataError)
    cost = trace.cost
    if cost is not None and (
        not isinstance(cost, tuple)
        or len(cost) != len(layers)
        or not all(is_real(value) for value in cost)
        or not all(low < high for low, high in pairwise((0, *cost)))
    ):
        raise DataError(
            f"cost is {cost}; expected {len(layers)} finite numbers above 0, ascending, one per exit.",
            field="cost",
            value=cost,
        )
    for name, kind in (("split", str), ("fingerprint", str), ("meta", dict), ("scalars", dict)):
        if not isinstance(getattr(trace, name), kind):
            value = getattr(trace, name)
            raise DataError(f"{name} is {value!r}; expected a {kind.__name__}.", field=name, value=value)


def _check_labels(labels: Tensor, rows: int, classes: int, problem_type: str) -> None:
    """Refuse labels that are not what the problem type wants."""
    if labels.ndim == 0 or labels.shape[0] != rows:
        raise DataError(f"labels has shape {list(labels.shape)} for {rows} rows; expected one a row.", field="labels")
    if problem_type != SINGLE_LABEL:
        if labels.numel() != rows * classes:
            raise DataError(f"labels has shape {list(labels.shape)}; expected [{rows}, {classes}].", field="labels")
        if not bool(torch.isfinite(labels).all()):
            row = int((~torch.isfinite(labels)).reshape(rows, -1).any(1).nonzero()[0])
            raise DataError(f"Row {row} has a label that is not finite; leave it out.", field="labels")
        return
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"labels are {str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}; expected class numbers, "
            f"integers of shape [{rows}].",
            field="labels",
        )
    if rows:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise DataError(f"Labels run from {low} to {high}; expected 0 to {classes - 1}.", field="labels")

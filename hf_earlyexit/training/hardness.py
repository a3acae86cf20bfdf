"""How hard each row is, measured once after the exits have learned, and kept under the row's own id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, DataError
from ..files import read_tensors, write_tensors
from ..metrics import steady_layer
from ..registry import Registry
from ..trace import ExitTrace
from ..values import MOST_LAYERS, is_whole
from .outcomes import Outcomes

FORMAT = "hf_earlyexit.hardness/1"
EXTREMES = 5  # so many smallest and largest losses are cut before scaling

HARDNESS: Registry[Callable[[Outcomes], Tensor]] = Registry("hardness")

ExampleId = int | str


@HARDNESS.register("memorized")
def memorized(outcomes: Outcomes) -> Tensor:
    """The layer of the first exit from which on all are right, `[N]`; the number of layers if the last is wrong."""
    return steady_layer(outcomes.right, outcomes.exit_layers)


@HARDNESS.register("oracle")
def oracle_layer(outcomes: Outcomes) -> Tensor:
    """The layer of the first exit that is right, whatever later exits say, `[N]`; the number of layers if none is."""
    right = outcomes.right
    first = torch.where(right.any(1), right.int().argmax(1), right.shape[1] - 1)
    return torch.tensor(outcomes.exit_layers, dtype=torch.float32)[first]


@HARDNESS.register("loss")
def loss_layer(outcomes: Outcomes) -> Tensor:
    """The last exit's loss, the extremes cut, scaled from 0 to the number of layers, `[N]`."""
    losses = outcomes.losses[:, -1]
    ranked = losses.sort().values
    edge = min(EXTREMES, len(ranked)) - 1
    low, high = ranked[edge], ranked[-1 - edge]
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return ((losses - low) / span).clamp(0, 1) * outcomes.exit_layers[-1]


@HARDNESS.register("none")
def no_hardness(outcomes: Outcomes) -> Tensor:
    """0 for every row, `[N]`: a layer costs each of them the same."""
    return torch.zeros(len(outcomes.losses))


@dataclass(frozen=True, kw_only=True, eq=False)
class HardnessTable:
    """Hardness of rows in layers, from 0 (easy) to the number of layers (hard), by the rows' own ids.

    Ids belong to the rows, not to their order: a data set may be shuffled, cut or joined and keeps its hardness.

    Args:
        ids: whole numbers or texts, each once.
        layers: `[N]`, float32, from 0 to `num_layers`.
        num_layers: of the model.
        measure: the name it was measured by.

    Raises:
        DataError: for doubled ids, or numbers out of range.
    """

    ids: tuple[ExampleId, ...]
    layers: Tensor
    num_layers: int
    measure: str = "memorized"

    def __post_init__(self) -> None:
        if not is_whole(self.num_layers, 1, MOST_LAYERS):
            raise DataError(
                f"num_layers is {self.num_layers!r}; expected a whole number from 1 to {MOST_LAYERS}.",
                field="num_layers",
                value=self.num_layers,
            )
        if not isinstance(self.measure, str):
            raise DataError(f"measure is {self.measure!r}; expected a name.", field="measure", value=self.measure)
        object.__setattr__(self, "ids", _checked_ids(self.ids, "hardness table"))
        object.__setattr__(self, "layers", self.layers.float())
        if self.layers.shape != (len(self.ids),):
            raise DataError(
                f"layers has shape {list(self.layers.shape)} for {len(self.ids)} ids; expected one a row.", field="layers"
            )
        inside = (self.layers >= 0) & (self.layers <= self.num_layers)  # false for nan
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0])
            value = float(self.layers[row])
            raise DataError(
                f"The hardness of row {self.ids[row]!r} is {value}; expected 0 to {self.num_layers} layers.",
                field="layers",
                value=value,
            )

    @classmethod
    def measured(cls, outcomes: Outcomes | ExitTrace, ids: Sequence[ExampleId], measure: str = "memorized") -> HardnessTable:
        """The table of some rows or tokens.

        Args:
            outcomes: of what the gates will learn from; of rows also their trace.
            ids: of these, in the same order.
            measure: a name of `HARDNESS`.
        """
        if isinstance(outcomes, ExitTrace):
            outcomes = Outcomes.of(outcomes)
        layers = HARDNESS.get(measure)(outcomes)
        return cls(ids=tuple(ids), layers=layers, num_layers=outcomes.exit_layers[-1], measure=measure)

    @classmethod
    def joined(cls, tables: Sequence[HardnessTable]) -> HardnessTable:
        """One table of several, for rows measured apart, as by models that were trained without them."""
        kinds = {(table.num_layers, table.measure) for table in tables}
        if len(kinds) != 1:
            raise DataError(f"The tables are of different kinds ({sorted(kinds)}); join tables of one.", field="tables")
        ids = tuple(key for table in tables for key in table.ids)
        return cls(
            ids=ids, layers=torch.cat([t.layers for t in tables]), num_layers=tables[0].num_layers, measure=tables[0].measure
        )

    def of(self, ids: Sequence[ExampleId]) -> Tensor:
        """Hardness of these rows in layers, `[len(ids)]`.

        Raises:
            DataError: for doubled ids, or ids the table does not hold.
        """
        place = {key: number for number, key in enumerate(self.ids)}
        foreign = [key for key in _checked_ids(ids, "rows") if key not in place]
        if foreign:
            raise DataError(
                f"{len(foreign)} of {len(ids)} rows are not in the hardness table, first id {foreign[0]!r}; it was "
                "measured on other rows. Measure it again.",
                field="ids",
                value=foreign[0],
            )
        return self.layers[torch.tensor([place[key] for key in ids], dtype=torch.long)]

    def require_exactly(self, ids: Sequence[ExampleId]) -> None:
        """Refuse to stand for other rows than these.

        Raises:
            DataError: for missing, doubled or foreign ids.
        """
        self.of(ids)
        surplus = set(self.ids) - set(ids)
        if surplus:
            first = min(surplus, key=str)
            raise DataError(
                f"The hardness table holds {len(surplus)} rows that are missing from the data, first id {first!r}; it was "
                "measured on other rows. Measure it again.",
                field="ids",
                value=first,
            )

    def histogram(self) -> dict[int, float]:
        """Share of rows per layer of hardness, rounded up: 0 to `num_layers`."""
        counts = torch.bincount(self.layers.ceil().long(), minlength=self.num_layers + 1)
        return {layer: count / max(len(self.ids), 1) for layer, count in enumerate(counts.tolist())}

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        plain = {"ids": self.ids, "num_layers": self.num_layers, "measure": self.measure}
        write_tensors(path, FORMAT, plain, {"layers": self.layers})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HardnessTable:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is damaged or holds something else.
        """
        try:
            plain, tensors = read_tensors(path, FORMAT)
            return cls(**plain, **tensors)
        except (OSError, SafetensorError, TypeError, ValueError) as error:  # data errors are ValueErrors
            raise CheckpointError(
                f"{path} is no hardness table ({error}); measure it again.", field=getattr(error, "field", None), path=path
            ) from error


def _checked_ids(ids: Sequence[Any], what: str) -> tuple[ExampleId, ...]:
    """The ids as a tuple.

    Raises:
        DataError: for an id that is doubled, missing, or neither a whole number nor a text.
    """
    if isinstance(ids, (str, dict)) or not hasattr(ids, "__iter__"):
        raise DataError(f"ids of the {what} are {ids!r}; expected a list.", field="ids", value=ids)
    seen: set[ExampleId] = set()
    for row, key in enumerate(ids):
        if not isinstance(key, (int, str)) or isinstance(key, bool):
            raise DataError(
                f"Row {row} of the {what} has id {key!r}; expected a whole number or a text.", field="ids", value=key
            )
        if key in seen:
            raise DataError(f"The id {key!r} comes twice in the {what}; every row needs its own.", field="ids", value=key)
        seen.add(key)
    return tuple(ids)

"""A classifier as the scheduler sees it: a way to begin, layers, exits, and a way to put batches together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..families.base import IMAGE, Family
from ..families.context import Context
from ..families.packed import join as join_packed
from ..families.prepared import prepared
from ..modeling.protocol import TorchExitClassifier
from ..policies.base import ExitPolicy, ExitStep
from ..signals import ExitSignal
from ..walking.step import Moved, Standing, Walks, step_to_exit
from .batching import pad_batch, padding_token
from .rows import TokenIds, check_ids
from .tables import PIXELS

CPU_TOKENS, ACCELERATOR_TOKENS = 512, 16384  # a CPU core is at its full rate from 256 tokens on
ACCELERATOR_WAIT = 0.005  # seconds, for fuller batches; not measured on any accelerator


class BatchWalker(Walks):
    """A model whose rows can be put together anew at every depth.

    Attributes:
        exit_layers: layers (1-based) after which rows may leave.
        num_classes: C.
        device: where hidden states are.
        images: whether rows are pictures.
        best_batch_tokens: padded tokens of a batch that suit it.
        best_wait: seconds that rows should wait for company at a depth while others run.
        lanes: batches that should be under way at once.
        reads_ahead: whether the host should read rows while others are under way, as it has nothing else to do.
    """

    exit_layers: tuple[int, ...]
    num_classes: int
    device: torch.device
    images: bool = False
    best_batch_tokens: int
    best_wait: float = 0.0
    lanes: int = 1
    reads_ahead: bool = False

    def check(self, row: TokenIds, number: int) -> DataError | None:
        """What keeps the model from reading this row, if anything."""

    def length(self, row: TokenIds) -> int:
        """Tokens of a row."""
        return len(row["input_ids"])

    def shape_of(self, row: TokenIds) -> Hashable:
        """Rows of one shape may stand in one batch; texts all may."""
        return None

    def apart(self, rows: Sequence[TokenIds]) -> list[list[int]]:
        """Places of the rows that may stand in one batch, group by group."""
        if not self.images:
            return [list(range(len(rows)))] if rows else []
        shapes: dict[Hashable, list[int]] = {}
        for place, row in enumerate(rows):
            shapes.setdefault(self.shape_of(row), []).append(place)
        return list(shapes.values())

    def begin(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Context]:
        """Hidden states before the first layer, and their context."""
        raise NotImplementedError

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        raise NotImplementedError

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Context, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells: see `walking.step.Walker`."""
        raise NotImplementedError

    def step(
        self, layers: range, rows: Standing, policy: ExitPolicy | None, exit_index: int | None
    ) -> tuple[Standing, ExitStep | None, Moved | None]:
        """As `step_to_exit`, but the rows may come back in another order: those who stay, then those who leave.

        Hidden states, the policy's state, answers and scores are in the new order then, and the third value tells of it; who
        leaves is told in the old one, and so is what the context holds on the host.
        """
        return *step_to_exit(self, layers, rows, policy, exit_index), None

    def alone(self, row: TokenIds, policy: ExitPolicy | None) -> tuple[Tensor, int, Tensor] | None:
        """What a row leaves with, by a quicker way for a row that nobody shares a batch with, if there is one.

        Args:
            row: that `check` has nothing against.
            policy: says when it leaves.

        Returns:
            Logits `[1, C]`, exit index and score `[1]`; `None` without such a way, or one for another policy.
        """
        return None

    def join(self, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]:
        """Batches of the same depth as one."""
        raise NotImplementedError


class ModelWalker(BatchWalker):
    """Walks a torch classifier with exits through its family; writes nothing on it.

    Args:
        model: a classifier with exits.
        pack: let rows stand end to end where the model allows it; `False` pads them.
    """

    def __init__(self, model: TorchExitClassifier, pack: bool = True) -> None:
        self.model, self.base = model, model.base_model
        self.family: Family = model.family
        self.packs, self.layers = prepared(self.family, self.base, pack)
        self.exit_layers = model.exit_layers
        self.num_classes = model.num_labels
        self.device = model.device
        self.images = self.family.task == IMAGE
        if not self.images:  # a config takes its time to answer, so it is not asked for every row
            config = self.base.config
            self.known = (config.vocab_size, self.family.longest(config), self.family.segments_of(config))
        on_cpu = self.device.type == "cpu"
        self.best_batch_tokens = CPU_TOKENS if on_cpu else ACCELERATOR_TOKENS
        self.best_wait = 0.0 if on_cpu else ACCELERATOR_WAIT
        self.reads_ahead = not on_cpu

    def check(self, row: TokenIds, number: int) -> DataError | None:
        """What keeps the model from reading this row, if anything."""
        return self._check_picture(row, number) if self.images else check_ids(row, number, *self.known)

    def _check_picture(self, row: Any, number: int) -> DataError | None:
        try:
            self.family.check(self.family, self.base, {name: values[None] for name, values in row.items()})
        except DataError as error:
            return DataError(f"Row {number}: {error}", field="rows", value=error.value)
        return None

    def length(self, row: Any) -> int:
        """Tokens of a row; of a picture, its patches."""
        if not self.images:
            return len(row["input_ids"])
        height, width = row[PIXELS].shape[1:]
        size = self.base.config.patch_size
        down, across = size if isinstance(size, (list, tuple)) else (size, size)
        return 1 + int(height // down) * int(width // across)

    def shape_of(self, row: Any) -> Hashable:
        """Texts all may stand in one batch; pictures with those of their size."""
        return tuple(row[PIXELS].shape) if self.images else None

    def begin(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Context]:
        """Hidden states `[B, T, H]` before the first layer, `[tokens, H]` where rows stand end to end, and their context."""
        batch = pad_batch(rows, padding_token(self.base.config))
        if self.packs:
            return self.family.begin_packed(self.base, dict(batch))  # looks at the mask while it is on the host
        return self.family.begin(self.base, dict(batch.to(self.device)), {})

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        after: Tensor = self.layers[layer - 1](hidden, context)
        return after

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Context, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells: see `walking.step.Walker`."""
        return self.model.exit_signal(exit_index, hidden, context, asks, before)

    def join(self, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]:
        """Batches of the same depth as one, padded to the widest where they are padded."""
        if self.packs:
            return join_packed(parts)
        return self.family.join(self.base, parts)

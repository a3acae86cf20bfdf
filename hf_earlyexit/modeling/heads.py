"""What stands at an exit: a way to pool the tokens, dropout, one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ..families.context import Part
from ..registry import Registry

HEADS: Registry[type[ExitHead]] = Registry("exit head")


class ExitHead(ABC, nn.Module):
    """Classifies the hidden states after one layer.

    Args:
        hidden_size: H.
        num_labels: C.
        dropout: applied to the pooled state in training.
    """

    one_token: ClassVar[bool] = False  # True: reads the token that answers alone, so only it is handed over
    borrows_pooler: ClassVar[bool] = False  # True: needs a family whose stock model has a pooler

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    @abstractmethod
    def pool(self, part: Part, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        """One vector per row.

        Args:
            part: states of the rows, and which tokens are real.
            stock_pool: the stock model's own pooling of `[B, 1, H]`.

        Returns:
            `[B, H]`.
        """

    def forward(self, state: Tensor) -> Tensor:
        """Logits `[B, C]` from the pooled state `[B, H]`."""
        return self.classifier(self.dropout(state))


@HEADS.register("linear")
class SharedPoolerHead(ExitHead):
    """Linear on the stock model's own pooler, shared by all exits: what the papers use.

    On backbones whose first token gathers nothing in lower layers these exits know nothing there; calibration says so.
    """

    one_token = borrows_pooler = True

    def pool(self, part: Part, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return stock_pool(part.hidden)


@HEADS.register("pooler")
class OwnPoolerHead(ExitHead):
    """A pooler of its own (dense and tanh on the token that answers), then linear."""

    one_token = True

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, dropout)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def pool(self, part: Part, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return self.dense(part.state).tanh()


@HEADS.register("linear-cls")
class FirstTokenHead(ExitHead):
    """Linear straight on the token that answers: the cheapest."""

    one_token = True

    def pool(self, part: Part, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return part.state


@HEADS.register("linear-mean")
class MeanHead(ExitHead):
    """Linear on the mean of the real tokens: alive from the first layer on, nearly as cheap."""

    def pool(self, part: Part, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return part.mean

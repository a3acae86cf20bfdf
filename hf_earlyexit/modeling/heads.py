"""What stands at an exit: a way to pool the tokens, dropout, one linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..registry import Registry

HEADS: Registry[type[ExitHead]] = Registry("exit head")


class ExitHead(ABC, nn.Module):
    """Classifies the hidden states after one layer.

    Args:
        hidden_size: H.
        num_labels: C.
        dropout: applied to the pooled state in training.
    """

    first_token: ClassVar[bool] = False  # True: reads the first token alone (a stock pooler does), so only it is handed over

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    @abstractmethod
    def pool(self, hidden: Tensor, tokens: Tensor | None, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        """One vector per row.

        Args:
            hidden: `[B, T, H]`.
            tokens: True at real tokens `[B, T]`; `None` if no row is padded.
            stock_pool: the stock model's own pooling.

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

    first_token = True

    def pool(self, hidden: Tensor, tokens: Tensor | None, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return stock_pool(hidden)


@HEADS.register("pooler")
class OwnPoolerHead(ExitHead):
    """A pooler of its own (dense and tanh on the first token), then linear."""

    first_token = True

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__(hidden_size, num_labels, dropout)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def pool(self, hidden: Tensor, tokens: Tensor | None, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return self.dense(hidden[:, 0]).tanh()


@HEADS.register("linear-cls")
class FirstTokenHead(ExitHead):
    """Linear straight on the first token: the cheapest."""

    first_token = True

    def pool(self, hidden: Tensor, tokens: Tensor | None, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        return hidden[:, 0]


@HEADS.register("linear-mean")
class MeanHead(ExitHead):
    """Linear on the mean of the real tokens: alive from the first layer on, nearly as cheap."""

    def pool(self, hidden: Tensor, tokens: Tensor | None, stock_pool: Callable[[Tensor], Tensor]) -> Tensor:
        if tokens is None:
            return hidden.mean(1)
        real = tokens.to(hidden.dtype)
        return torch.einsum("bth,bt->bh", hidden, real) / real.sum(1, keepdim=True).clamp_min(1)
